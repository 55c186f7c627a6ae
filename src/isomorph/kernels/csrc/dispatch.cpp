#include "dispatch.h"

#include <cstdlib>

namespace isomorph {

std::vector<const Backend*> available_backends() {
  std::vector<const Backend*> found = avx512_backends();
  for (const Backend* backend : {avx2_backend(), neon_backend(), portable_backend()})
    if (backend) found.push_back(backend);
  return found;
}

static const Backend*& chosen() {
  static const Backend* backend = [] {
    const char* name = std::getenv("ISOMORPH_KERNELS");
    for (const Backend* found : available_backends())
      if (!name || std::string(name) == found->name) return found;
    return available_backends().front();
  }();
  return backend;
}

const Backend& backend() { return *chosen(); }

bool choose_backend(const std::string& name) {
  for (const Backend* found : available_backends())
    if (name == found->name) {
      chosen() = found;
      return true;
    }
  return false;
}

}  // namespace isomorph
