// Winograd's transforms for 3x3 convolutions with padding 1 (winograd.cpp): of inputs, of gradients, and back to maps.
//
// In one dimension four outputs are y = A' [(G w) o (B' d)], from six inputs d and three taps w: F(4, 3) of Lavin and
// Gray 2016, section 4.3. Read for its taps, the same trilinear form gives their gradient: dw = G' [(A u) o (B' d)].
// Maps are transformed along columns as they lie in memory, and along rows as four phases: every fourth column, from 0,
// 1, 2 and 3.
#pragma once
#include "cpu.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

constexpr int POINTS = WINOGRAD_POINTS, STEP = WINOGRAD_STEP;
static_assert(POINTS == 6 && STEP == 4);

// B': of six inputs. Element i of every array belongs to one tile, or one column of tiles.
inline void transform_inputs(const float* const in[], float* const out[], int64_t count) {
  const float *x0 = in[0], *x1 = in[1], *x2 = in[2], *x3 = in[3], *x4 = in[4], *x5 = in[5];
  float *y0 = out[0], *y1 = out[1], *y2 = out[2], *y3 = out[3], *y4 = out[4], *y5 = out[5];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float even = x4[i] - 4 * x2[i], odd = x3[i] - 4 * x1[i];
    const float near = x4[i] - x2[i], far = 2 * (x3[i] - x1[i]);
    y0[i] = 4 * (x0[i] - x2[i]) + near;
    y1[i] = even + odd;
    y2[i] = even - odd;
    y3[i] = near + far;
    y4[i] = near - far;
    y5[i] = x5[i] - x3[i] - 4 * (x3[i] - x1[i]);
  }
}

// A: of four gradients.
inline void transform_gradients(const float* const in[], float* const out[], int64_t count) {
  const float *u0 = in[0], *u1 = in[1], *u2 = in[2], *u3 = in[3];
  float *y0 = out[0], *y1 = out[1], *y2 = out[2], *y3 = out[3], *y4 = out[4], *y5 = out[5];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float even = u0[i] + u2[i], odd = u1[i] + u3[i];
    const float even4 = u0[i] + 4 * u2[i], odd4 = 2 * u1[i] + 8 * u3[i];
    y0[i] = u0[i];
    y1[i] = even + odd;
    y2[i] = even - odd;
    y3[i] = even4 + odd4;
    y4[i] = even4 - odd4;
    y5[i] = u3[i];
  }
}

// A': four outputs of six points, plus `bias`.
inline void transform_back(const float* const in[], float* const out[], int64_t count, float bias) {
  const float *m0 = in[0], *m1 = in[1], *m2 = in[2], *m3 = in[3], *m4 = in[4], *m5 = in[5];
  float *y0 = out[0], *y1 = out[1], *y2 = out[2], *y3 = out[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const float even = m1[i] + m2[i], odd = m1[i] - m2[i];
    const float even4 = m3[i] + m4[i], odd4 = m3[i] - m4[i];
    y0[i] = m0[i] + even + even4 + bias;
    y1[i] = odd + 2 * odd4 + bias;
    y2[i] = even + 4 * even4 + bias;
    y3[i] = odd + 8 * odd4 + m5[i] + bias;
  }
}

inline void split_phases(const float* row, float* const phases[], int64_t count) {
  float *p0 = phases[0], *p1 = phases[1], *p2 = phases[2], *p3 = phases[3];
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    p0[i] = row[4 * i];
    p1[i] = row[4 * i + 1];
    p2[i] = row[4 * i + 2];
    p3[i] = row[4 * i + 3];
  }
}

inline void join_phases(const float* phases, float* row, int64_t count) {
  const float *p0 = phases, *p1 = p0 + count, *p2 = p1 + count, *p3 = p2 + count;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    row[4 * i] = p0[i];
    row[4 * i + 1] = p1[i];
    row[4 * i + 2] = p2[i];
    row[4 * i + 3] = p3[i];
  }
}

inline float* points_of(const Winograd& work, int point, int64_t channel, int64_t down) {
  return work.tiles + (point * work.channels + channel) * work.down * work.across + down * work.across;
}

// One channel's tiles.
template <bool GRADIENTS>
void transform_channel(const Winograd& work, int64_t channel, float* scratch) {
  constexpr int TAPS = GRADIENTS ? STEP : POINTS, BEFORE = GRADIENTS ? 0 : 1;
  constexpr auto transform = GRADIENTS ? transform_gradients : transform_inputs;
  const int64_t across = work.across, padded = across * STEP;
  const float *map = work.maps + channel * work.height * work.width, *zeros = scratch;
  float *transformed[POINTS], *phases[STEP];  // each phase with a zero before and after it
  for (int p = 0; p < POINTS; ++p) transformed[p] = scratch + (p + 1) * padded;
  for (int p = 0; p < STEP; ++p) phases[p] = scratch + (POINTS + 1) * padded + p * (across + 2) + 1;
  __builtin_memset(scratch, 0, sizeof(float) * work.scratch());

  for (int64_t down = 0; down < work.down; ++down) {
    const float* rows[POINTS];
    for (int tap = 0; tap < TAPS; ++tap) {
      const int64_t row = (work.first + down) * STEP + tap - BEFORE;
      rows[tap] = row < 0 || row >= work.height ? zeros : map + row * work.width;
    }
    transform(rows, transformed, work.width);  // what follows the width stays zero
    for (int p = 0; p < POINTS; ++p) {
      split_phases(transformed[p], phases, across);
      const float* columns[POINTS];
      for (int tap = 0; tap < TAPS; ++tap) {
        const int column = tap - BEFORE;
        columns[tap] = column < 0 ? phases[STEP - 1] - 1 : phases[column % STEP] + column / STEP;
      }
      float* outputs[POINTS];
      for (int q = 0; q < POINTS; ++q) outputs[q] = points_of(work, p * POINTS + q, channel, down);
      transform(columns, outputs, across);
    }
  }
}

// One channel's rows of its map, from its tiles.
void transform_channel_back(const Winograd& work, int64_t channel, float* scratch) {
  const int64_t across = work.across, padded = across * STEP;
  const float bias = work.bias ? work.bias[channel] : 0.f;
  float *halves[POINTS], *quarters[STEP], *last = scratch + (POINTS + STEP) * padded;
  for (int p = 0; p < POINTS; ++p) halves[p] = scratch + p * padded;
  for (int p = 0; p < STEP; ++p) quarters[p] = scratch + (POINTS + p) * padded;

  for (int64_t down = 0; down < work.down; ++down) {
    for (int p = 0; p < POINTS; ++p) {
      const float* points[POINTS];
      float* phases[STEP];
      for (int q = 0; q < POINTS; ++q) points[q] = points_of(work, p * POINTS + q, channel, down);
      for (int phase = 0; phase < STEP; ++phase) phases[phase] = halves[p] + phase * across;
      transform_back(points, phases, across, 0.f);
    }
    transform_back(halves, quarters, padded, bias);
    for (int p = 0; p < STEP; ++p) {
      const int64_t row = (work.first + down) * STEP + p;
      if (row >= work.height) break;
      float* to = work.outputs + (channel * work.height + row) * work.width;
      join_phases(quarters[p], padded == work.width ? to : last, across);
      if (padded != work.width) __builtin_memcpy(to, last, sizeof(float) * work.width);
    }
  }
}

// Channels begin to end; `scratch` has room for Winograd::scratch floats.
void run_winograd(const Winograd& work, WinogradPass pass, int64_t begin, int64_t end, float* scratch) {
  const auto transform = pass == WinogradPass::inputs      ? transform_channel<false>
                         : pass == WinogradPass::gradients ? transform_channel<true>
                                                           : transform_channel_back;
  for (int64_t channel = begin; channel < end; ++channel) transform(work, channel, scratch);
}

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
