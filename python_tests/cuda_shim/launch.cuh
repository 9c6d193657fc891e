#pragma once
// Stands for csrc/cuda/launch.cuh: kernels on host threads run one after the other.
#include "common.cuh"

inline void wait_for_inputs() {}
