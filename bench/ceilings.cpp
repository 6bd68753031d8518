// What a CPU can do at most, measured: FMA and AMX products from registers, and reading memory.
// Every function runs for about `seconds` on `threads` threads and returns a rate per second over
// all of them, or 0 where this CPU lacks the instructions.
#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "tandem/tandem.h"

namespace {

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work done per second: `step()` does `work` of it and is repeated by every thread.
template <typename Step>
double Rate(int32_t threads, double seconds, double work, const Step& step) {
  double total = 0;
  double longest = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total) reduction(max : longest)
  {
    step(omp_get_thread_num());
#pragma omp barrier
    const double start = Now();
    double spent = 0;
    while (spent < seconds) {
      step(omp_get_thread_num());
      total += work;
      spent = Now() - start;
    }
    longest = spent;
  }
  return total / longest;
}

constexpr int kSteps = 4096;

// Twelve chains hide the latency of four cycles at two FMAs each, with room to spare.
__attribute__((target("avx512f"))) void FmaAvx512() {
  __m512 a[12];
  for (int n = 0; n < 12; ++n) a[n] = _mm512_set1_ps(static_cast<float>(n));
  __m512 x = _mm512_set1_ps(0.99f), y = _mm512_set1_ps(0.01f);
  for (int step = 0; step < kSteps; ++step) {
    for (int n = 0; n < 12; ++n) a[n] = _mm512_fmadd_ps(a[n], x, y);
    // The compiler may neither hoist nor combine the steps.
    asm volatile(""
                 : "+v"(a[0]), "+v"(a[1]), "+v"(a[2]), "+v"(a[3]), "+v"(a[4]), "+v"(a[5]),
                   "+v"(a[6]), "+v"(a[7]), "+v"(a[8]), "+v"(a[9]), "+v"(a[10]), "+v"(a[11]));
  }
}

__attribute__((target("avx2,fma"))) void FmaAvx2() {
  __m256 a[12];
  for (int n = 0; n < 12; ++n) a[n] = _mm256_set1_ps(static_cast<float>(n));
  __m256 x = _mm256_set1_ps(0.99f), y = _mm256_set1_ps(0.01f);
  for (int step = 0; step < kSteps; ++step) {
    for (int n = 0; n < 12; ++n) a[n] = _mm256_fmadd_ps(a[n], x, y);
    asm volatile(""
                 : "+x"(a[0]), "+x"(a[1]), "+x"(a[2]), "+x"(a[3]), "+x"(a[4]), "+x"(a[5]),
                   "+x"(a[6]), "+x"(a[7]), "+x"(a[8]), "+x"(a[9]), "+x"(a[10]), "+x"(a[11]));
  }
}

// Linux hands out the tile registers on request.
bool AmxIsAllowed() {
  uint32_t eax = 7, ebx = 0, ecx = 0, edx = 0;
  asm volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool has_tiles = (edx >> 24 & 1) != 0 && (edx >> 22 & 1) != 0;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return has_tiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Random operands: the clock depends on the data.
struct alignas(64) Tiles {
  uint16_t values[4][512];
  Tiles() {
    uint64_t state = 1;
    for (auto& tile : values) {
      for (uint16_t& value : tile) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        value = static_cast<uint16_t>((state >> 63 << 15) | (0x3f00 + (state >> 40 & 0xff)));
      }
    }
  }
};

// Four accumulators, two tiles of rows and two of columns, all in registers.
__attribute__((target("amx-tile,amx-bf16"))) void AmxProducts(const Tiles& tiles) {
  const TileConfig config;
  // GCC 12's intrinsic says that it reads 8 of these 64 bytes, and the others would not be written.
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, tiles.values[0], 64);
  _tile_loadd(5, tiles.values[1], 64);
  _tile_loadd(6, tiles.values[2], 64);
  _tile_loadd(7, tiles.values[3], 64);
  for (int step = 0; step < kSteps; ++step) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

uint64_t Sum(const uint64_t* data, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t n = 0; n < count; n += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += data[n + lane];
  }
  uint64_t sum = 0;
  for (const uint64_t lane : sums) sum += lane;
  return sum;
}

}  // namespace

extern "C" {

TANDEM_API double tandem_bench_fma_flops_per_second(int32_t threads, double seconds) {
  if (__builtin_cpu_supports("avx512f")) {
    return Rate(threads, seconds, 2.0 * 16 * 12 * kSteps, [](int) { FmaAvx512(); });
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return Rate(threads, seconds, 2.0 * 8 * 12 * kSteps, [](int) { FmaAvx2(); });
  }
  return 0;
}

TANDEM_API double tandem_bench_amx_flops_per_second(int32_t threads, double seconds) {
  if (!AmxIsAllowed()) return 0;
  const Tiles tiles;
  return Rate(threads, seconds, 4.0 * 2 * 16 * 16 * 32 * kSteps, [&](int) { AmxProducts(tiles); });
}

// Reads memory of at least four times the last-level cache, split between the threads, over and
// over.
TANDEM_API double tandem_bench_read_bytes_per_second(int32_t threads, double seconds) {
  const int64_t chunk = int64_t{1} << 17;  // words: 1 MiB
  const int64_t cache = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), int64_t{64} << 20);
  const int64_t chunks = std::max<int64_t>(4, 4 * cache / (chunk * 8) / threads);
  std::vector<uint64_t*> memory(static_cast<size_t>(threads), nullptr);
  std::vector<int64_t> position(static_cast<size_t>(threads) * 16, 0);
  bool failed = false;
#pragma omp parallel num_threads(threads)
  {
    const size_t thread = static_cast<size_t>(omp_get_thread_num());
    const int64_t words = chunk * chunks;
    void* data = std::aligned_alloc(64, static_cast<size_t>(words) * 8);
    if (data == nullptr) {
#pragma omp atomic write
      failed = true;
    } else {
      memory[thread] = static_cast<uint64_t*>(data);
      for (int64_t n = 0; n < words; ++n) memory[thread][n] = static_cast<uint64_t>(n);
    }
  }
  double rate = 0;
  if (!failed) {
    rate = Rate(threads, seconds, static_cast<double>(chunk) * 8, [&](int thread) {
      int64_t& at = position[static_cast<size_t>(thread) * 16];
      volatile uint64_t sum = Sum(memory[static_cast<size_t>(thread)] + at * chunk, chunk);
      static_cast<void>(sum);
      at = (at + 1) % chunks;
    });
  }
  for (uint64_t* data : memory) std::free(data);
  return rate;
}

}  // extern "C"
