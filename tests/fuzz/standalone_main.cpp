// A driver for fuzz targets where the compiler has none (libFuzzer comes with clang): runs every
// file of a corpus, then mutations of them for a given time. Each input depends on the seed and its
// number alone; the input that ends the process is left in ./crash-input.
//
//   fuzz_x SECONDS CORPUS_DIRECTORY [SEED]
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Input = std::vector<uint8_t>;

Input current;

void SaveCurrent() {
  const int file = open("crash-input", O_WRONLY | O_CREAT | O_TRUNC, 0644);
  if (file >= 0 && write(file, current.data(), current.size()) >= 0) close(file);
}

void OnSignal(int number) {
  SaveCurrent();
  std::signal(number, SIG_DFL);
  std::raise(number);
}

void RunInput(const Input& input) {
  current = input;
  LLVMFuzzerTestOneInput(current.data(), current.size());
}

std::vector<Input> ReadCorpus(const char* directory) {
  std::vector<std::filesystem::path> paths;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.is_regular_file()) paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<Input> corpus;
  for (const std::filesystem::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

Input Mutate(const std::vector<Input>& corpus, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return n == 0 ? 0 : static_cast<size_t>(random() % n); };
  Input input = corpus.empty() ? Input(below(300)) : corpus[below(corpus.size())];
  static constexpr uint8_t kTelling[] = {0, 1, 0x7f, 0x80, 0xff, '-', '9', '\'', '(', ',', 'O'};
  for (size_t n = below(8) + 1; n > 0; --n) {
    const size_t place = below(input.size() + 1);
    switch (below(6)) {
      case 0:
        input.insert(input.begin() + static_cast<std::ptrdiff_t>(place),
                     static_cast<uint8_t>(random()));
        break;
      case 1:
        if (place < input.size()) input.erase(input.begin() + static_cast<std::ptrdiff_t>(place));
        break;
      case 2:
        input.resize(place);
        break;
      case 3:
        input.insert(input.end(), below(64), static_cast<uint8_t>(random()));
        break;
      case 4:
        if (place < input.size()) input[place] = kTelling[below(sizeof(kTelling))];
        break;
      default:
        if (place < input.size()) input[place] = static_cast<uint8_t>(random());
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s SECONDS CORPUS_DIRECTORY [SEED]\n", argv[0]);
    return 2;
  }
  const std::chrono::duration<double> limit(std::atof(argv[1]));
  const uint64_t seed = argc > 3 ? std::strtoull(argv[3], nullptr, 0) : 1;
  for (const int number : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    std::signal(number, OnSignal);
  }
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(SaveCurrent);
  const std::vector<Input> corpus = ReadCorpus(argv[2]);
  for (const Input& input : corpus) RunInput(input);
  const auto begin = std::chrono::steady_clock::now();
  uint64_t count = 0;
  while (std::chrono::steady_clock::now() - begin < limit) {
    RunInput(Mutate(corpus, seed * 0x9E3779B97F4A7C15u + count));
    ++count;
  }
  printf("%zu files, %llu mutations, seed %llu: no crash\n", corpus.size(),
         static_cast<unsigned long long>(count), static_cast<unsigned long long>(seed));
  return 0;
}
