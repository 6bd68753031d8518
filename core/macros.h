// One macro for functions that host and device compile alike. They are static and always inlined,
// so that no object file compiled for a newer instruction set can hand its copy to a baseline
// caller (docs/architecture.md, "ISA files").
#ifndef TANDEM_CORE_MACROS_H_
#define TANDEM_CORE_MACROS_H_

#include <stdint.h>

#if defined(__CUDACC__)
#define TANDEM_HD static __host__ __device__ __forceinline__
#define TANDEM_UNROLL _Pragma("unroll")
#else
#define TANDEM_HD static inline __attribute__((always_inline, unused))
#define TANDEM_UNROLL
#endif

namespace tandem::core {

template <typename T>
TANDEM_HD T Min(T a, T b) {
  return a < b ? a : b;
}
template <typename T>
TANDEM_HD T Max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
TANDEM_HD T Clamp(T x, T low, T high) {
  return x < low ? low : (high < x ? high : x);
}
// a / b rounded up, for a >= 0, b > 0.
template <typename T>
TANDEM_HD T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}
template <typename T>
TANDEM_HD T RoundUp(T a, T b) {
  return CeilDiv(a, b) * b;
}

}  // namespace tandem::core

#endif  // TANDEM_CORE_MACROS_H_
