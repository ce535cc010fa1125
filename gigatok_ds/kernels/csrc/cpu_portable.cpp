// The passes for any processor.
#include <cstdint>
#include "cpu.h"

#define GIGATOK_LEVEL portable
#define GIGATOK_WIDTH 4
#include "cpu_level.h"
#include "winograd.h"

const gigatok::Level gigatok::portable_level{
    "portable", gigatok::portable::WIDTH, gigatok::portable::run_pass, nullptr, gigatok::portable::run_winograd};
