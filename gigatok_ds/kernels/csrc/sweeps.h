// The five passes, as sweeps: some latents or codes stay in lanes while the others are streamed past them.
//
// A sweep says what a lane keeps (State), how it starts (begin), what it does with a few streamed elements (step), and
// what it leaves (end). Whoever drives it, a thread of a GPU or a vector loop, decides how elements come.
//
// Every pass first filters: score = z.e - |e|^2/2 costs one multiply-add a dimension, and |z - e|^2 = |z|^2 - 2 score,
// so that only codes with a score above a threshold can be the nearest, or matter to the softmax. For those the
// distance is computed directly as sum (z - e)^2, which loses nothing to cancellation. Rounding errors of the filter
// are part of the threshold (rounding_bound), so that it never drops what it should not.
#pragma once
#include "lanes.h"

namespace gigatok {
inline namespace GIGATOK_LEVEL {

// Elements first, first + 1, ... of an array of `count`, one for each lane; the last one stands in for those beyond.
template <class V>
GIGATOK_INLINE V load(const float* array, int first, int count) {
  V v;
  for (int i = 0; i < Lanes<V>::count; ++i) lane(v, i) = fetch(array + (first + i < count ? first + i : count - 1));
  return v;
}

template <class V>
GIGATOK_INLINE void store(float* array, int first, int count, V v) {
  for (int i = 0; i < Lanes<V>::count && first + i < count; ++i) array[first + i] = lane(v, i);
}

// (D + 4) * 6 * 2^-24 * (|z|^2 + |e|^2)/2 bounds the error of score, |z|^2/2 and half the computed distance together:
// each is a chain of at most D + 2 roundings of at most 2^-24 of partial sums, none larger than 2 (|z|^2 + |e|^2).
template <class V, int D>
GIGATOK_INLINE V rounding_bound(V half_latent, float largest_half_code) {
  return (half_latent + largest_half_code) * ((D + 4) * 6 * 5.9604645e-8f);
}

template <class V, int D>
GIGATOK_INLINE V score(const V (&a)[D], const float* b, V start) {
  GIGATOK_UNROLL
  for (int d = 0; d < D; ++d) start = multiply_add(a[d], broadcast<V>(b[d]), start);
  return start;
}

// |a - b|^2, in four partial sums: shorter chains round less.
template <class V, int D>
GIGATOK_INLINE V distance(const V (&a)[D], const float* b) {
  V sums[4];
  GIGATOK_UNROLL
  for (int d = 0; d < D; ++d) {
    const V difference = a[d] - broadcast<V>(b[d]);
    sums[d % 4] = d < 4 ? difference * difference : multiply_add(difference, difference, sums[d % 4]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows first, first + 1, ... of an (count, D) array, one for each lane.
template <class V, int D>
GIGATOK_INLINE void load_rows(V (&rows)[D], const float* array, int first, int count) {
  for (int i = 0; i < Lanes<V>::count; ++i) {
    const int64_t row = first + i < count ? first + i : count - 1;
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) lane(rows[d], i) = fetch(array + row * D + d);
  }
}

// What sweeps with latents in lanes have in common: they stream codes.
template <int D>
struct OverCodes {
  static constexpr int dim = D;
  static constexpr float beyond = -HUGE_DISTANCE;  // the side value of an element that is none
  Problem problem;
  GIGATOK_INLINE int residents() const { return problem.count; }
  GIGATOK_INLINE int streamed() const { return problem.size; }
  GIGATOK_INLINE const float* elements() const { return problem.codes; }
  GIGATOK_INLINE const float* sides() const { return problem.minus_half_codes; }
};

template <int D>
struct OverLatents {
  static constexpr int dim = D;
  static constexpr float beyond = HUGE_DISTANCE;
  Problem problem;
  GIGATOK_INLINE int residents() const { return problem.size; }
  GIGATOK_INLINE int streamed() const { return problem.count; }
  GIGATOK_INLINE const float* elements() const { return problem.latents; }
  GIGATOK_INLINE const float* sides() const { return problem.thresholds; }
};

// Scores of G streamed elements against the lanes; does any of them pass its threshold?
template <class V, int G, int D>
GIGATOK_INLINE bool any_code_passes(V (&scores)[G], const V (&latent)[D], const float* codes, const float* minus_halves,
                                    V threshold) {
  V most;
  GIGATOK_UNROLL
  for (int g = 0; g < G; ++g) {
    scores[g] = score<V, D>(latent, codes + g * D, broadcast<V>(minus_halves[g]));
    most = g ? larger(most, scores[g]) : scores[g];
  }
  return any(most > threshold);
}

template <class V, int G, int D>
GIGATOK_INLINE bool any_latent_passes(V (&excess)[G], const V (&code)[D], V minus_half, const float* latents,
                                      const float* thresholds) {
  V most;
  GIGATOK_UNROLL
  for (int g = 0; g < G; ++g) {
    excess[g] = score<V, D>(code, latents + g * D, minus_half) - broadcast<V>(thresholds[g]);
    most = g ? larger(most, excess[g]) : excess[g];
  }
  return any(most > broadcast<V>(0.f));
}

// A latent's nearest code so far and, if SOFT, the sums of its softmax relative to that code (online softmax).
template <class V, bool SOFT>
struct Nearest {
  using Index = typename Lanes<V>::Index;
  V ceiling, threshold, best, rest, moment;
  Index index;

  // ceiling: the score of a code at distance 0, less what the filter must let pass.
  GIGATOK_INLINE void begin(V ceiling_) {
    ceiling = ceiling_;
    threshold = broadcast<V>(-0.1f * HUGE_DISTANCE);
    best = broadcast<V>(HUGE_DISTANCE);
    rest = moment = broadcast<V>(0.f);
    index = Index{} - 1;
  }

  // Take a code into account whose distance is known. Codes come in rising order, so that the lowest wins a tie.
  GIGATOK_INLINE void accept(V distance, int32_t code, float sharpness) {
    const auto nearer = distance < best;
    if (any(nearer)) {
      const V now = select(nearer, distance, best);
      index = select_index(nearer, code, index);
      if (SOFT) {  // the code that was best becomes one of the others
        const V change = larger((now - best) * sharpness, broadcast<V>(-HUGE_DISTANCE)), factor = power_of_two(change);
        const V others = select(nearer, rest + 1.f, rest);
        moment = factor * multiply_add(others, change, moment);
        rest = factor * others;
      }
      best = now;
      threshold = ceiling - best * 0.5f;
    }
    if (SOFT) {
      const V y = (best - distance) * sharpness, p = select(nearer, broadcast<V>(0.f), power_of_two(y));
      rest = rest + p;
      moment = multiply_add(p, y, moment);
    }
  }

  GIGATOK_INLINE void end(RowPartial* partials, int first, int count) {
    for (int i = 0; i < Lanes<V>::count && first + i < count; ++i)
      partials[first + i] = {lane(best, i), lane(rest, i), lane(moment, i), lane(index, i)};
  }
};

template <class V, int D>
GIGATOK_INLINE V ceiling_of(const Problem& problem, int first) {
  const V half = load<V>(problem.half_latents, first, problem.count);
  return half - rounding_bound<V, D>(half, fetch(problem.largest_half_code)) - problem.margin;
}

// Latents in lanes: the nearest code and, if SOFT, the softmax's normalisation and entropy.
template <class V, int D, bool SOFT>
struct Assign : OverCodes<D> {
  struct State {
    V latent[D];
    Nearest<V, SOFT> nearest;
  };

  GIGATOK_INLINE void begin(State& s, int first) const {
    load_rows<V, D>(s.latent, this->problem.latents, first, this->problem.count);
    s.nearest.begin(ceiling_of<V, D>(this->problem, first));
  }
  template <int G>
  GIGATOK_INLINE void step(State& s, const float* codes, const float* minus_halves, int first) const {
    V scores[G];
    if (!any_code_passes<V, G, D>(scores, s.latent, codes, minus_halves, s.nearest.threshold)) return;
    GIGATOK_UNROLL
    for (int g = 0; g < G; ++g)
      if (any(scores[g] > s.nearest.threshold))
        s.nearest.accept(distance<V, D>(s.latent, codes + g * D), first + g, this->problem.sharpness);
  }
  GIGATOK_INLINE void flush(State&) const {}
  GIGATOK_INLINE void end(State& s, int first, int split) const {
    s.nearest.end(this->problem.row_partials + (int64_t)split * this->problem.count, first, this->problem.count);
  }
};

// Codes in lanes: sum_n p_nk. Sums of a tile are added up apart, so that many latents do not drown a small one.
template <class V, int D>
struct Average : OverLatents<D> {
  struct State {
    V code[D], minus_half, sum, total;
  };

  GIGATOK_INLINE void begin(State& s, int first) const {
    load_rows<V, D>(s.code, this->problem.codes, first, this->problem.size);
    s.minus_half = load<V>(this->problem.minus_half_codes, first, this->problem.size);
    s.sum = s.total = broadcast<V>(0.f);
  }
  template <int G>
  GIGATOK_INLINE void step(State& s, const float* latents, const float* thresholds, int first) const {
    V excess[G];
    if (!any_latent_passes<V, G, D>(excess, s.code, s.minus_half, latents, thresholds)) return;
    GIGATOK_UNROLL
    for (int g = 0; g < G; ++g)
      if (any(excess[g] > broadcast<V>(0.f))) {
        const RowTerms& terms = this->problem.terms[first + g];
        const V gap = broadcast<V>(terms.best) - distance<V, D>(s.code, latents + g * D);
        s.sum = s.sum + power_of_two(gap * this->problem.sharpness - terms.bits);
      }
  }
  GIGATOK_INLINE void flush(State& s) const {
    s.total = s.total + s.sum;
    s.sum = broadcast<V>(0.f);
  }
  GIGATOK_INLINE void end(State& s, int first, int split) const {
    store<V>(this->problem.partials + (int64_t)split * this->problem.size, first, this->problem.size, s.total);
  }
};

// Latents in lanes. With w_nk = p_nk (share_k - base_n - h_n ln p_nk - offset_n) the gradient at z_n is 2/T sum_k w_nk
// (e_k - c) for any c, since the weights add up to zero for any base and the offset that belongs to it. c is the
// nearest code and base its share, because small numbers lose few digits. The offset is known only at the end: kept
// apart are its sum p (share - base), the mean sum p (e - c), and the pull sum p (share - base - h ln p) (e - c).
template <class V, int D>
struct LatentGradient : OverCodes<D> {
  struct State {
    V latent[D], centre[D], mean[D], pull[D], best, bits, threshold, gradient, base, offset;
  };

  GIGATOK_INLINE void begin(State& s, int first) const {
    const Problem& problem = this->problem;
    load_rows<V, D>(s.latent, problem.latents, first, problem.count);
    s.threshold = load<V>(problem.thresholds, first, problem.count);
    for (int i = 0; i < Lanes<V>::count; ++i) {
      const int row = first + i < problem.count ? first + i : problem.count - 1;
      const int64_t nearest = problem.indices[row] < 0 ? 0 : problem.indices[row];
      GIGATOK_UNROLL
      for (int d = 0; d < D; ++d) lane(s.centre[d], i) = fetch(problem.codes + nearest * D + d);
      lane(s.best, i) = problem.terms[row].best;
      lane(s.bits, i) = problem.terms[row].bits;
      lane(s.gradient, i) = problem.terms[row].gradient * LN2;
      lane(s.base, i) = problem.terms[row].base;
    }
    s.offset = broadcast<V>(0.f);
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) s.mean[d] = s.pull[d] = s.offset;
  }
  template <int G>
  GIGATOK_INLINE void step(State& s, const float* codes, const float* minus_halves, int first) const {
    V scores[G];
    if (!any_code_passes<V, G, D>(scores, s.latent, codes, minus_halves, s.threshold)) return;
    GIGATOK_UNROLL
    for (int g = 0; g < G; ++g)
      if (any(scores[g] > s.threshold)) accept(s, codes + g * D, fetch(this->problem.shares + first + g));
  }
  GIGATOK_INLINE void accept(State& s, const float* code, float share) const {
    const V y = (s.best - distance<V, D>(s.latent, code)) * this->problem.sharpness - s.bits;
    const V p = power_of_two(y), above = broadcast<V>(share) - s.base, q = p * (above - s.gradient * y);
    s.offset = multiply_add(p, above, s.offset);
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) {
      const V difference = broadcast<V>(code[d]) - s.centre[d];
      s.mean[d] = multiply_add(p, difference, s.mean[d]);
      s.pull[d] = multiply_add(q, difference, s.pull[d]);
    }
  }
  GIGATOK_INLINE void flush(State&) const {}
  GIGATOK_INLINE void end(State& s, int first, int split) const {
    const int64_t count = this->problem.count;
    float* values = this->problem.partials + split * count * (2 * D + 1);
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) {
      store<V>(values + d * count, first, count, s.pull[d]);
      store<V>(values + (D + d) * count, first, count, s.mean[d]);
    }
    store<V>(values + 2 * D * count, first, count, s.offset);
  }
};

// Codes in lanes: the gradient at e_k is 2/T sum_n w_nk (z_n - e_k), by the weights of LatentGradient.
template <class V, int D>
struct CodeGradient : OverLatents<D> {
  struct State {
    V code[D], sum[D], minus_half, share;
  };

  GIGATOK_INLINE void begin(State& s, int first) const {
    load_rows<V, D>(s.code, this->problem.codes, first, this->problem.size);
    s.minus_half = load<V>(this->problem.minus_half_codes, first, this->problem.size);
    s.share = load<V>(this->problem.shares, first, this->problem.size);
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) s.sum[d] = broadcast<V>(0.f);
  }
  template <int G>
  GIGATOK_INLINE void step(State& s, const float* latents, const float* thresholds, int first) const {
    V excess[G];
    if (!any_latent_passes<V, G, D>(excess, s.code, s.minus_half, latents, thresholds)) return;
    GIGATOK_UNROLL
    for (int g = 0; g < G; ++g)
      if (any(excess[g] > broadcast<V>(0.f))) accept(s, latents + g * D, this->problem.terms[first + g]);
  }
  GIGATOK_INLINE void accept(State& s, const float* latent, const RowTerms& terms) const {
    const V gap = broadcast<V>(terms.best) - distance<V, D>(s.code, latent);
    const V y = gap * this->problem.sharpness - terms.bits, p = power_of_two(y);
    const V weight = p * ((s.share - terms.base) - terms.offset - y * (terms.gradient * LN2));
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) s.sum[d] = multiply_add(weight, broadcast<V>(latent[d]) - s.code[d], s.sum[d]);
  }
  GIGATOK_INLINE void flush(State&) const {}
  GIGATOK_INLINE void end(State& s, int first, int split) const {
    const int64_t size = this->problem.size;
    float* values = this->problem.partials + split * size * D;
    GIGATOK_UNROLL
    for (int d = 0; d < D; ++d) store<V>(values + d * size, first, size, s.sum[d]);
  }
};

}  // namespace GIGATOK_LEVEL
}  // namespace gigatok
