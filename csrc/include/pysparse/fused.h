#pragma once
// Several weights that take the same activations, multiplied in one call: query, key and value; and
// gate and up, with the activation and the product that follow them.
#include "pysparse/int8.h"
#include "pysparse/linear.h"

namespace pysparse {

// Its functions of transformers' ACT2FN: "silu", "gelu" (by erf), "gelu_pytorch_tanh", "relu".
enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
inline constexpr int kActivations = 4;

struct GatedProduct {
  static constexpr const char* op = "gate";
  static constexpr const char* format = "dense";
  static constexpr int64_t kLanes = 16;
  struct Kernel {
    // gate[i] = activation(gate[i]) * up[i], rounded to the type of the values after the activation
    // and after the product, as two operations on tensors would. `count` is a multiple of kLanes,
    // both arrays are aligned to 64 bytes.
    void (*run)(Activation activation, void* gate, const void* up, int64_t count);
  };
};

// A weight with what the caller claims of its buffers, and its bias (may be null).
struct BitmapOperand {
  TiledBitmapView weight;
  BufferSizes sizes;
  const void* bias;
};

// outputs[i] = x W_i^T + b_i, [tokens][rows of W_i], for `count` weights of the same columns and
// type: x is packed once, the tiles of all weights are shared out over the threads together. Each
// output has the bits of bitmap_linear's.
void bitmap_linear_group(const BitmapOperand* operands, int count, const void* x, int64_t tokens,
                         void* const* outputs);

// y = activation(x W_g^T + b_g) * (x W_u^T + b_u), [tokens][rows], tile by tile: the two halves of
// a tile meet in the first-level cache.
void bitmap_gated_linear(const BitmapOperand& gate, const BitmapOperand& up, Activation activation,
                         const void* x, int64_t tokens, void* y);

// The same for int8 weights; each output has the bits of int8_linear's.
struct Int8Operand {
  TiledInt8View weight;
  Int8Sizes sizes;
  const void* bias;
};

struct QuantizedCall {
  const void* x;  // [tokens][columns]
  int64_t tokens;
  int parts;    // bytes of a quantised activation
  DType dtype;  // of x, the biases and the outputs
};

void int8_linear_group(const Int8Operand* operands, int count, const QuantizedCall& call,
                       void* const* outputs);
void int8_gated_linear(const Int8Operand& gate, const Int8Operand& up, Activation activation,
                       const QuantizedCall& call, void* y);

}  // namespace pysparse
