// The passes for x86 processors with AVX-512.
#include <cstdint>
#include "cpu.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// After the standard headers: their functions are shared with files compiled for any processor.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#define GIGATOK_LEVEL avx512
#define GIGATOK_WIDTH 16
#include "cpu_level.h"
#include "product.h"
#include "winograd.h"

#pragma GCC pop_options
const gigatok::Level gigatok::avx512_level{"avx512", gigatok::avx512::WIDTH, gigatok::avx512::run_pass,
                                          gigatok::avx512::run_product, gigatok::avx512::run_winograd};
#else
const gigatok::Level gigatok::avx512_level{"avx512", 0, nullptr, nullptr, nullptr};
#endif
