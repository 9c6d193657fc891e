#pragma once
// Machine code from elsewhere for this module's kernels.

namespace pysparse::cuda {

// From now on, launches on `device` of those kernels that `image` (an ELF file for that device)
// holds take their code from there. The driver copies the image; a later one replaces kernels of
// the same name. *kernels: how many there are.
int load_code(const void* image, int device, int* kernels);

}  // namespace pysparse::cuda
