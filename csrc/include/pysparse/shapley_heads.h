#pragma once
// Deep heads over embeddings: DeepFM, DCN-v2, DCN-Mix. D = fields * cols inputs x0.
#include "pysparse/shapley_entries.h"

namespace pysparse {

struct FloatArray {
  const float* values;
  int64_t count;
};

enum class Cross { kNone = 0, kFull = 1, kMixture = 2 };

// logit = offset + pairs (if any) + final . mlp(x) + cross_out . x_L (if any), where x is x_L when
// crosses are stacked below the MLP (cross_out is empty), else x0.
struct HeadView {
  bool pairs;  // the factorisation machine's term
  Cross cross;
  int64_t crosses, experts, rank;
  const int64_t* widths;  // [hidden]
  int64_t hidden;
  FloatArray mlp;  // for each layer weight [out][in] and bias [out]; then the final weight and bias
  // kFull: x' = x + x0 (W x + b), cross_weight [crosses][D][D].
  // kMixture: x' = x + sum_i g_i(x) x0 (U_i tanh(C_i tanh(V_i^T x)) + b), g_i(x) = <gate_i, x>;
  // cross_weight holds for each cross U [experts][D][rank], C [experts][rank][rank] and V
  // [experts][D][rank].
  FloatArray cross_weight, cross_bias;  // bias [crosses][D]
  FloatArray gates;                     // [experts][D], shared by the crosses
  FloatArray cross_out;                 // [D] or empty
};

// As fm_shapley and fm_marginals; rows of coalitions go through dense products in blocks, the first
// layer moves by one column of its weight a removal.
void head_shapley(const EntrySamples& samples, const EntryDraw& draw, const HeadView& head,
                  const EntryTotals& totals);
void head_marginals(const EntrySamples& samples, const EntryDraw& draw, const HeadView& head,
                    float* marginals);

}  // namespace pysparse
