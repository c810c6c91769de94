// The twins of shuffles, votes, atomics, matrix loads, mma and copies against their definitions: for mma and ldmatrix
// the element by element tables of the PTX ISA, not the pairs of gpu.h.
#include <cmath>
#include <cstring>

#include "kit.h"

using namespace kg::cuda;
using kg::bf16;
using kit::deviceBuffer;
using kit::hostCopy;
using kit::launch;

namespace {

int failures = 0;
void expect(bool holds, const char* what) {
  if (holds) return;
  failures++;
  printf("FAILED: %s\n", what);
}

// ---- lanes
// -----------------------------------------------------------------------------------------------------------
constexpr int kAnswers = 10;
KG_GLOBAL void lanes(int64_t* y) {
  const int lane = laneId();
  int64_t* at = y + threadIdx.x * kAnswers;
  at[0] = shuffle(lane * 3, 5);
  at[1] = shuffle(int64_t{1} << lane, lane + 33);
  at[2] = shuffleXor(lane, 6);
  at[3] = shuffleDown(lane, 4);
  at[4] = shuffleUp(lane, 4);
  at[5] = ballot(lane % 3 == 0);
  at[6] = anyLane(lane == 31) + 2 * anyLane(lane == 32);
  at[7] = allLanes(lane < 32) + 2 * allLanes(lane < 31);
  at[8] = warpId();
  at[9] = static_cast<int64_t>(shuffleXor(0.5 + lane, 1) * 2);
}

void testLanes() {
  const int threads = 96;
  auto* y = deviceBuffer<int64_t>(threads * kAnswers);
  launch(1, threads, 0, lanes, y);
  const auto found = hostCopy(y, threads * kAnswers);
  bool right = true;
  for (int t = 0; t < threads; t++) {
    const int l = t % 32;
    const int64_t expected[kAnswers] = {15,
                                        int64_t{1} << ((l + 33) % 32),
                                        l ^ 6,
                                        l + 4 < 32 ? l + 4 : l,
                                        l >= 4 ? l - 4 : l,
                                        0x49249249,
                                        1,
                                        1,
                                        t / 32,
                                        2 * (l ^ 1) + 1};
    right = right && memcmp(&found[static_cast<size_t>(t * kAnswers)], expected, sizeof expected) == 0;
  }
  expect(right, "shuffles and votes");
}

// ---- atomics
// ---------------------------------------------------------------------------------------------------------
KG_GLOBAL void atomics(int32_t* y) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAddInt(y, i);
  atomicMaxInt(y + 1, i);
  atomicMinInt(y + 2, i);
  if (atomicCas(y + 3, 0, 1) == 0) atomicAddInt(y + 4, 1);
}

void testAtomics() {
  auto* y = deviceBuffer(std::vector<int32_t>{0, -5, 5, 0, 0});
  launch(3, 64, 0, atomics, y);
  expect(hostCopy(y, 5) == std::vector<int32_t>({191 * 192 / 2, 191, 0, 1, 1}), "atomics");
}

// ---- ldmatrix
// --------------------------------------------------------------------------------------------------------
constexpr int kPitch = 24;  // elements between rows
KG_GLOBAL void loads(const uint16_t* x, uint32_t* y) {
  auto* s = reinterpret_cast<uint16_t*>(dynamicShared());
  for (int i = laneId(); i < 32 * kPitch; i += kWarp) s[i] = x[i];
  syncWarp();
  uint32_t r[4];
  loadMatrix4(r, s + laneId() * kPitch);
  for (int m = 0; m < 4; m++) y[laneId() * 8 + m] = r[m];
  loadMatrix4Transposed(r, s + laneId() * kPitch);
  for (int m = 0; m < 4; m++) y[laneId() * 8 + 4 + m] = r[m];
}

void testLoads() {
  std::vector<uint16_t> x(32 * kPitch);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<uint16_t>(i * 31 + 7);
  auto* y = deviceBuffer<uint32_t>(32 * 8);
  launch(1, 32, 32 * kPitch * 2, loads, deviceBuffer(x), y);
  const auto found = hostCopy(y, 32 * 8);
  bool right = true, rightTransposed = true;
  for (size_t l = 0; l < 32; l++)
    for (size_t m = 0; m < 4; m++)
      for (size_t h = 0; h < 2; h++) {  // the half of the register
        const size_t row = l / 4, column = 2 * (l % 4) + h;
        const auto half = [&](size_t r) { return static_cast<uint16_t>(found[l * 8 + r] >> (16 * h)); };
        right = right && half(m) == x[(8 * m + row) * kPitch + column];
        rightTransposed = rightTransposed && half(4 + m) == x[(8 * m + column) * kPitch + row];
      }
  expect(right, "loadMatrix4");
  expect(rightTransposed, "loadMatrix4Transposed");
}

// ---- mma: element i of a lane's fragment, PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"
// --------
struct Place {
  int row, column;
};
Place placeOfA(int lane, int i) {
  const int group = lane >> 2, inGroup = lane % 4;
  return {(i < 2 || (i >= 4 && i < 6)) ? group : group + 8, i < 4 ? inGroup * 2 + (i & 1) : inGroup * 2 + (i & 1) + 8};
}
Place placeOfB(int lane, int i) {
  const int group = lane >> 2, inGroup = lane % 4;
  return {i < 2 ? inGroup * 2 + (i & 1) : inGroup * 2 + (i & 1) + 8, group};
}
Place placeOfC(int lane, int i) {
  const int group = lane >> 2, inGroup = lane % 4;
  return {i < 2 ? group : group + 8, inGroup * 2 + (i & 1)};
}

KG_GLOBAL void multiply(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t ra[4], rb[2];
  float rd[4];
  for (int i = 0; i < 4; i++) ra[i] = a[laneId() * 4 + i];
  for (int i = 0; i < 2; i++) rb[i] = b[laneId() * 2 + i];
  for (int i = 0; i < 4; i++) rd[i] = d[laneId() * 4 + i];
  mmaBf16(rd, ra, rb);
  mmaBf16(rd, ra, rb);
  for (int i = 0; i < 4; i++) d[laneId() * 4 + i] = rd[i];
}

void testMultiply() {
  float a[16][16], b[16][8], c[16][8];
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      a[i][k] = static_cast<float>(bf16(0.37f * static_cast<float>((i * 5 + k * 3) % 11 - 5)));
  for (int k = 0; k < 16; k++)
    for (int j = 0; j < 8; j++)
      b[k][j] = static_cast<float>(bf16(0.21f * static_cast<float>((k * 7 + j * 2) % 13 - 6)));
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) c[i][j] = static_cast<float>(i * 8 + j);
  std::vector<bf16> fa(32 * 8), fb(32 * 4);
  std::vector<float> fc(32 * 4);
  for (int l = 0; l < 32; l++) {
    for (int i = 0; i < 8; i++) fa[static_cast<size_t>(l * 8 + i)] = bf16(a[placeOfA(l, i).row][placeOfA(l, i).column]);
    for (int i = 0; i < 4; i++) fb[static_cast<size_t>(l * 4 + i)] = bf16(b[placeOfB(l, i).row][placeOfB(l, i).column]);
    for (int i = 0; i < 4; i++) fc[static_cast<size_t>(l * 4 + i)] = c[placeOfC(l, i).row][placeOfC(l, i).column];
  }
  float* d = deviceBuffer(fc);
  launch(1, 32, 0, multiply, reinterpret_cast<uint32_t*>(deviceBuffer(fa)),
         reinterpret_cast<uint32_t*>(deviceBuffer(fb)), d);
  const auto found = hostCopy(d, 32 * 4);
  double worst = 0;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      const Place at = placeOfC(l, i);
      double expected = static_cast<double>(c[at.row][at.column]);
      for (int k = 0; k < 16; k++)
        expected += 2.0 * static_cast<double>(a[at.row][k]) * static_cast<double>(b[k][at.column]);
      worst = std::max(worst, std::fabs(static_cast<double>(found[static_cast<size_t>(l * 4 + i)]) - expected));
    }
  expect(worst < 1e-4, "mmaBf16");
}

// ---- conversions and copies
// ------------------------------------------------------------------------------------------
KG_GLOBAL void convert(uint32_t* y) {
  if (threadIdx.x != 0) return;
  y[0] = packBf16(1.0f, -2.0f);
  y[1] = packBf16(1.00390625f, 1.01171875f);  // ties: to even, down and up
  y[2] = fastExp2(3.0f) == 8.0f && fastExp2(-INFINITY) == 0.0f;
  y[3] = fastReciprocal(4.0f) == 0.25f;
}
KG_GLOBAL void copies(const uint32_t* x, uint32_t* y) {
  auto* s = reinterpret_cast<uint32_t*>(dynamicShared());
  const int i = static_cast<int>(threadIdx.x);
  copyAsync16(s + i * 4, x + i * 4, i % 2 == 0);
  copyAsyncCommit();
  copyAsyncWait<0>();
  syncThreads();
  for (int j = 0; j < 4; j++) y[i * 4 + j] = s[i * 4 + j];
}

void testConversions() {
  auto* y = deviceBuffer<uint32_t>(4);
  launch(1, 32, 0, convert, y);
  expect(hostCopy(y, 4) == std::vector<uint32_t>({0xc0003f80u, 0x3f823f80u, 1, 1}), "conversions");
}
void testCopies() {
  std::vector<uint32_t> x(256), expected(256);
  for (size_t i = 0; i < 256; i++) x[i] = static_cast<uint32_t>(i + 1);
  for (size_t i = 0; i < 256; i++) expected[i] = i / 4 % 2 == 0 ? x[i] : 0;
  auto* y = deviceBuffer<uint32_t>(256);
  launch(1, 64, 1024, copies, deviceBuffer(x), y);
  expect(hostCopy(y, 256) == expected, "asynchronous copies");
}

// ---- graphs, events, host functions
// ------------------------------------------------------------------------------------
KG_GLOBAL void increment(int32_t* y) { atomicAddInt(y, threadIdx.x == 0 ? 1 : 0); }

void testGraphs() {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  auto* y = deviceBuffer(std::vector<int32_t>{0});
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
  simt::launch(2, 32, 0, stream, increment, y);
  cudaStreamEndCapture(stream, &graph);
  cudaGraphInstantiate(&executable, graph, 0);
  for (int i = 0; i < 3; i++) cudaGraphLaunch(executable, stream);
  int seen = 0;
  cudaLaunchHostFunc(stream, [](void* at) { *static_cast<int*>(at) = 1; }, &seen);
  cudaStreamSynchronize(stream);
  expect(hostCopy(y, 1)[0] == 6 && seen == 1, "captured graphs and host functions");
  cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed);
  const cudaError_t waited = cudaStreamSynchronize(stream);
  expect(waited == cudaErrorStreamCaptureUnsupported &&
             cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated && !graph,
         "no waiting in a capture");
}

}  // namespace

int main() {
  testLanes();
  testAtomics();
  testLoads();
  testMultiply();
  testConversions();
  testCopies();
  testGraphs();
  if (failures == 0) printf("right\n");
  return failures == 0 ? 0 : 1;
}
