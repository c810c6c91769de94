// The rows of elementwise.def as functors. Owns no kernel.
#pragma once

#include "cuda/math.h"
#include "cuda/strided.h"

namespace kg::cuda {

#define KG_UNARY(name, expression)  \
  struct Row_##name {               \
    template <class C>              \
    static KG_DEVICE C apply(C x) { \
      return expression;            \
    }                               \
  };
#define KG_BINARY(name, expression)      \
  struct Row_##name {                    \
    template <class C>                   \
    static KG_DEVICE C apply(C x, C y) { \
      return expression;                 \
    }                                    \
  };
#define KG_COMPARE(name, expression)        \
  struct Row_##name {                       \
    template <class C>                      \
    static KG_DEVICE bool apply(C x, C y) { \
      return expression;                    \
    }                                       \
  };
#define KG_REDUCE(name, initial, combination) \
  struct Row_##name {                         \
    template <class C>                        \
    static KG_DEVICE C identity() {           \
      return initial;                         \
    }                                         \
    template <class C>                        \
    static KG_DEVICE C apply(C a, C x) {      \
      return combination;                     \
    }                                         \
  };
#include "ops/all.def"

// Elements of T that one thread moves at a time. float64 goes one by one: it is there to check gradients.
template <class T>
constexpr int kItem = sizeof(T) == 8 ? 1 : 16 / static_cast<int>(sizeof(T));

}  // namespace kg::cuda
