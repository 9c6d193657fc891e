// Ridge problems in lanes: 16 rows share a register, so that the Cholesky factor and its inverse
// need no shuffles. B is formed in the 4 x 4 tiles that update it; L^-1 exists four columns at a
// time, which stay in the first-level cache.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/ridge.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
namespace pysparse {
namespace {

constexpr int kTile = kRidgeTile;
using Vector = __m512;
using Tile = Vector[kTile][kTile];
static_assert(kRidgeGroup == 16);

constexpr size_t kBytes = sizeof(Vector);

struct Work {
  Vector* lower;    // L row by row, packed: row i begins at i (i + 1) / 2
  Vector* scale;    // D
  Vector* inverse;  // 1 / L_ii
  Vector* panel;    // four columns of L^-1, [padded][kTile]; later the vector that is solved for

  Work(void* scratch, int padded)
      : lower(static_cast<Vector*>(scratch)),
        scale(lower + padded * (padded + 1) / 2),
        inverse(scale + padded),
        panel(inverse + padded) {}
  Vector* row(int i) const { return lower + i * (i + 1) / 2; }
};

size_t scratch_bytes(int padded) {
  const auto n = static_cast<size_t>(padded);
  return (n * (n + 1) / 2 + n * (2 + kTile)) * kBytes;
}

// Rows [begin, begin + lanes) of one column of a row-major matrix; lanes that are not there are 0.
Vector load_column(const float* column, __m512i offsets, __mmask16 lanes) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, offsets, column, 4);
}

// tile -= the product of four rows of L and four rows or columns given by `right`, over [from, to).
template <class Right>
void subtract_products(Tile& tile, const Work& work, int row, int from, int to,
                       const Right& right) {
  const Vector* rows[kTile];
  for (int i = 0; i < kTile; ++i) rows[i] = work.row(row + i);
  for (int k = from; k < to; ++k) {
    Vector b[kTile];
#pragma GCC unroll 4
    for (int j = 0; j < kTile; ++j) b[j] = right(k, j);
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      const Vector a = rows[i][k];
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) tile[i][j] = _mm512_fnmadd_ps(a, b[j], tile[i][j]);
    }
  }
}

// A tile of B = I + D H D.
void form_tile(Tile& tile, const RidgeView& view, const Work& work, int row, int col) {
  for (int i = 0; i < kTile; ++i) {
    const float* h = view.gram + static_cast<ptrdiff_t>(row + i) * view.padded + col;
    for (int j = 0; j < kTile; ++j) {
      const Vector both = _mm512_mul_ps(work.scale[row + i], work.scale[col + j]);
      const Vector one = _mm512_set1_ps(row + i == col + j ? 1.0f : 0.0f);
      tile[i][j] = _mm512_fmadd_ps(both, _mm512_set1_ps(h[j]), one);
    }
  }
}

// The factor of a tile on the diagonal, whose upper part is not read.
void factor_diagonal(Tile& tile, const Work& work, int row) {
  for (int j = 0; j < kTile; ++j) {
    for (int q = 0; q < j; ++q)
      for (int i = j; i < kTile; ++i)
        tile[i][j] = _mm512_fnmadd_ps(tile[i][q], tile[j][q], tile[i][j]);
    tile[j][j] = _mm512_sqrt_ps(tile[j][j]);
    const Vector inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), tile[j][j]);
    work.inverse[row + j] = inverse;
    for (int i = j + 1; i < kTile; ++i) tile[i][j] = _mm512_mul_ps(tile[i][j], inverse);
    for (int q = 0; q <= j; ++q) work.row(row + j)[row + q] = tile[j][q];
  }
}

// A tile below the diagonal: the solution with the factor of the diagonal tile of its columns.
void factor_below(Tile& tile, const Work& work, int row, int col) {
#pragma GCC unroll 4
  for (int j = 0; j < kTile; ++j) {
    const Vector* l = work.row(col + j) + col;
    for (int q = 0; q < j; ++q)
      for (int i = 0; i < kTile; ++i) tile[i][j] = _mm512_fnmadd_ps(tile[i][q], l[q], tile[i][j]);
    for (int i = 0; i < kTile; ++i) tile[i][j] = _mm512_mul_ps(tile[i][j], work.inverse[col + j]);
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) work.row(row + i)[col + j] = tile[i][j];
}

void factor(const RidgeView& view, const Work& work) {
  for (int col = 0; col < view.padded; col += kTile) {
    const Vector* rows[kTile];
    for (int j = 0; j < kTile; ++j) rows[j] = work.row(col + j);
    for (int row = col; row < view.padded; row += kTile) {
      Tile tile;
      form_tile(tile, view, work, row, col);
      subtract_products(tile, work, row, 0, col, [&](int k, int j) { return rows[j][k]; });
      if (row == col)
        factor_diagonal(tile, work, row);
      else
        factor_below(tile, work, row, col);
    }
  }
}

// The squared norms of the columns [col, col + kTile) of L^-1, the diagonal of B^-1.
void inverse_norms(const RidgeView& view, const Work& work, int col, Vector (&norms)[kTile]) {
  for (auto& norm : norms) norm = _mm512_setzero_ps();
  for (int row = col; row < view.padded; row += kTile) {
    Tile tile;
    for (int i = 0; i < kTile; ++i)
      for (int j = 0; j < kTile; ++j) tile[i][j] = _mm512_set1_ps(row + i == col + j ? 1.0f : 0.0f);
    subtract_products(tile, work, row, col, row,
                      [&](int k, int j) { return work.panel[k * kTile + j]; });
#pragma GCC unroll 4
    for (int i = 0; i < kTile; ++i) {
      const Vector* l = work.row(row + i) + row;
#pragma GCC unroll 4
      for (int j = 0; j < kTile; ++j) {
        for (int q = 0; q < i; ++q) tile[i][j] = _mm512_fnmadd_ps(l[q], tile[q][j], tile[i][j]);
        tile[i][j] = _mm512_mul_ps(tile[i][j], work.inverse[row + i]);
        work.panel[(row + i) * kTile + j] = tile[i][j];
        norms[j] = _mm512_fmadd_ps(tile[i][j], tile[i][j], norms[j]);
      }
    }
  }
}

// x <- B^-1 x by both substitutions; four sums hide the latency of the dots.
void solve(const Work& work, int size, Vector* x) {
  for (int i = 0; i < size; ++i) {
    const Vector* l = work.row(i);
    Vector sums[kTile] = {x[i], _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int k = 0; k < i; ++k) sums[k % kTile] = _mm512_fnmadd_ps(l[k], x[k], sums[k % kTile]);
    const Vector sum =
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    x[i] = _mm512_mul_ps(sum, work.inverse[i]);
  }
  for (int i = size - 1; i >= 0; --i) {
    const Vector* l = work.row(i);
    x[i] = _mm512_mul_ps(x[i], work.inverse[i]);
    for (int k = 0; k < i; ++k) x[k] = _mm512_fnmadd_ps(l[k], x[i], x[k]);
  }
}

void run(const RidgeView& view, int64_t begin, int64_t end, void* scratch) {
  const Work work(scratch, view.padded);
  const auto lanes = static_cast<__mmask16>((1u << (end - begin)) - 1);
  const __m512i offsets =
      _mm512_mullo_epi32(_mm512_set1_epi32(view.size),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const int64_t first = begin * view.size;
  for (int i = 0; i < view.padded; ++i)
    work.scale[i] =
        i < view.size ? load_column(view.scale + first + i, offsets, lanes) : _mm512_setzero_ps();
  factor(view, work);
  for (int col = 0; col < view.padded; col += kTile) {
    Vector norms[kTile];
    inverse_norms(view, work, col, norms);
    for (int j = 0; j < std::min(kTile, view.size - col); ++j)
      _mm512_mask_i32scatter_ps(view.inverse_diagonal + first + col + j, lanes, offsets, norms[j],
                                4);
  }
  for (int i = 0; i < view.size; ++i)
    work.panel[i] =
        _mm512_mul_ps(work.scale[i], load_column(view.target + first + i, offsets, lanes));
  solve(work, view.size, work.panel);
  for (int i = 0; i < view.size; ++i)
    _mm512_mask_i32scatter_ps(view.solution + first + i, lanes, offsets,
                              _mm512_mul_ps(work.scale[i], work.panel[i]), 4);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RidgeRows::Kernel kKernel{scratch_bytes, run};
const Register<RidgeRows> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
