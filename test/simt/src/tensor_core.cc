#include "tensor_core.h"

#include <cstring>

namespace simt {
namespace {

// Eight columns of the product at once.
typedef float Row __attribute__((vector_size(32)));

float lowFloat(uint32_t pair) {
  const uint32_t bits = pair << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
float highFloat(uint32_t pair) {
  const uint32_t bits = pair & 0xffff0000u;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

}  // namespace

void distributeMatrices(LaneOperands* const* lanes) {
  for (int l = 0; l < 32; l++)
    for (int m = 0; m < 4; m++) {
      const int i = l / 4, j = 2 * (l % 4);
      const uint16_t low = lanes[0]->transposed ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j];
      const uint16_t high = lanes[0]->transposed ? lanes[8 * m + j + 1]->row[i] : lanes[8 * m + i]->row[j + 1];
      lanes[l]->a[m] = low | static_cast<uint32_t>(high) << 16;
    }
}

void multiplyTile(LaneOperands* const* lanes) {
  float a[16][16];
  Row b[16];
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) {  // registers: rows g, g + 8, then the same 8 columns further
      const int i = g + 8 * (r & 1), k = 2 * t + 8 * (r >> 1);
      a[i][k] = lowFloat(lanes[l]->a[r]);
      a[i][k + 1] = highFloat(lanes[l]->a[r]);
    }
    for (int r = 0; r < 2; r++) {
      b[2 * t + 8 * r][g] = lowFloat(lanes[l]->b[r]);
      b[2 * t + 8 * r + 1][g] = highFloat(lanes[l]->b[r]);
    }
  }
  float product[16][8];
  for (int i = 0; i < 16; i++) {
    Row sum{};
    for (int k = 0; k < 16; k++) sum += a[i][k] * b[k];
    memcpy(product[i], &sum, sizeof sum);
  }
  for (int l = 0; l < 32; l++) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; r++) lanes[l]->d[r] += product[g + 8 * (r >> 1)][2 * t + (r & 1)];
  }
}

}  // namespace simt
