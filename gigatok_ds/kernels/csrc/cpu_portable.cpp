// The passes for any processor.
#include <cstdint>
#include "cpu.h"

#define GIGATOK_LEVEL portable
#define GIGATOK_WIDTH 4
#include "cpu_level.h"
#include "product.h"

const gigatok::Level gigatok::portable_level{
    "portable", gigatok::portable::WIDTH, gigatok::portable::TILE_ROWS, gigatok::portable::run_pass, gigatok::portable::run_product};
