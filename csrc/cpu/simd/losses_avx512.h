#pragma once
// Log losses along a walk, sixteen steps at a time. Include inside a target region. What is fused
// is written so: csrc/cuda/shapley.cuh finds the same bits.

namespace pysparse {
namespace {

inline __m512 broadcast_last(__m512 v) { return _mm512_permutexvar_ps(_mm512_set1_epi32(15), v); }

template <int kBy>
inline __m512 shift_up(__m512 v) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(v), _mm512_setzero_si512(), 16 - kBy));
}

inline __m512 running_sum(__m512 v) {
  v = _mm512_add_ps(v, shift_up<1>(v));
  v = _mm512_add_ps(v, shift_up<2>(v));
  v = _mm512_add_ps(v, shift_up<4>(v));
  return _mm512_add_ps(v, shift_up<8>(v));
}

// straight + log(1 + e^-a), a >= 0. e^r by its series to r^6 (|r| <= ln 2 / 2: 1e-7), then log(1 +
// e) = 2 atanh(e / (2 + e)) to the 13th power (argument <= 1/3: 1e-8).
inline __m512 add_log1p_exp(__m512 minus_a, __m512 straight) {
  const __m512 x = _mm512_max_ps(minus_a, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  const __m512 e = _mm512_scalef_ps(p, n);
  const __m512 z = _mm512_div_ps(e, _mm512_add_ps(e, _mm512_set1_ps(2.0f)));
  const __m512 z2 = _mm512_mul_ps(z, z);
  __m512 q = _mm512_set1_ps(2.0f / 13);
  for (const float c : {2.0f / 11, 2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
    q = _mm512_fmadd_ps(q, z2, _mm512_set1_ps(c));
  return _mm512_fmadd_ps(q, z, straight);
}

inline __m512 log_loss(__m512 logit, __m512 label) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 size = _mm512_abs_ps(logit);
  const __m512 straight = _mm512_fnmadd_ps(label, logit, _mm512_max_ps(logit, zero));
  return add_log1p_exp(_mm512_sub_ps(zero, size), straight);
}

// In place: steps of the logit become steps of the loss; both ends of a step use the same stored
// loss, so that the steps sum to the difference of the walk's ends. Room for whole vectors. Returns
// the largest size (NaN is above infinity); meanwhile(), called for each vector, may ask for
// memory.
template <class Meanwhile>
inline float loss_steps(float* steps, int count, float logit, float label,
                        const Meanwhile& meanwhile) {
  const __m512 y = _mm512_set1_ps(label);
  __m512 t = _mm512_set1_ps(logit), before = log_loss(t, y);
  __m512i peak = _mm512_setzero_si512();  // sizes as whole numbers: in the order of the floats
  for (int i = 0; i < count; i += 16) {
    const __m512 step = _mm512_loadu_ps(steps + i);
    const __m512 now = _mm512_add_ps(running_sum(step), t);
    const __m512 loss = log_loss(now, y);
    const __m512 previous = _mm512_castsi512_ps(
        _mm512_alignr_epi32(_mm512_castps_si512(loss), _mm512_castps_si512(before), 15));
    // A step of zero must cost exactly nothing, but the sums around it round differently.
    const auto live = static_cast<__mmask16>((1u << std::min(16, count - i)) - 1);
    const __mmask16 moved = _mm512_mask_cmp_ps_mask(live, step, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512 change = _mm512_maskz_sub_ps(moved, loss, previous);
    _mm512_storeu_ps(steps + i, change);
    peak = _mm512_max_epu32(peak, _mm512_castps_si512(_mm512_abs_ps(change)));
    meanwhile();
    t = broadcast_last(now);
    before = broadcast_last(loss);
  }
  return _mm512_cvtss_f32(
      _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(_mm512_reduce_max_epu32(peak)))));
}

}  // namespace
}  // namespace pysparse
