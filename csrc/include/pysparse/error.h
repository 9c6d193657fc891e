#pragma once
// The one error path: operations check before any memory is touched and throw; kernels never throw.
#include <sstream>
#include <stdexcept>

namespace pysparse {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (!ok) fail(parts...);
}

}  // namespace pysparse
