// The passes for x86 processors with AVX2 and FMA.
#include <cstdint>
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// After the standard headers: their functions are shared with files compiled for any processor.
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define GIGATOK_LEVEL avx2
#define GIGATOK_WIDTH 8
#include "cpu_level.h"
#include "winograd.h"

#pragma GCC pop_options
const gigatok::Level gigatok::avx2_level{
    "avx2", gigatok::avx2::WIDTH, gigatok::avx2::run_pass, nullptr, gigatok::avx2::run_winograd};
#else
const gigatok::Level gigatok::avx2_level{"avx2", 0, nullptr, nullptr, nullptr};
#endif
