// What the fuzzers share: memory that ends where it is said to, and their entry points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

#ifdef ISOMORPH_SAMPLE
constexpr std::initializer_list<int> kWidths{4};
#else
constexpr std::initializer_list<int> kWidths{2, 3, 4, 5, 6, 8};
#endif

struct Buffer {  // `data` of `size` bytes at offset `shift`, flush with the end of the allocation
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
  Buffer(size_t size, size_t shift) : memory(new uint8_t[size + shift]), data(memory.get() + shift) {}
};

template <class T>
T pick(std::mt19937& random, std::initializer_list<T> from) {
  return from.begin()[random() % from.size()];
}

// The instruction sets of this machine, plain C++ first.
inline std::vector<std::string> plain_first() {
  std::vector<std::string> names;
  for (const isomorph::Backend* found : isomorph::available_backends()) names.insert(names.begin(), found->name);
  return names;
}

// Each is false, and has said why, when something is wrong.
bool codec_is_right(std::mt19937& random, const std::string& fault);
bool step_is_right(std::mt19937& random, const std::string& fault);
bool dense_is_right(std::mt19937& random, const std::string& fault);
