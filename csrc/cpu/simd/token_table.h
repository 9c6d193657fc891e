#pragma once
// Turns a token count known at run time into one of the functions Work::run<1> ... Work::run<kMax>,
// so that a kernel's accumulators live in registers.
#include <array>
#include <utility>

namespace pysparse {
namespace {

template <class Work, int... kIndex>
constexpr auto make_token_table(std::integer_sequence<int, kIndex...>) {
  return std::array{&Work::template run<kIndex + 1>...};
}

template <class Work, int kMax>
constexpr auto kTokenTable = make_token_table<Work>(std::make_integer_sequence<int, kMax>{});

}  // namespace
}  // namespace pysparse
