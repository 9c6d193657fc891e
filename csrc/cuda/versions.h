#pragma once
namespace pysparse::cuda {

// 13000 is CUDA 13.0; driver: 0 without one.
struct Versions {
  int driver, runtime;
};
Versions versions();

}  // namespace pysparse::cuda
