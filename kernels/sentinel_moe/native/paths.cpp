// Which paths this build has, best first.

#include <cstring>

#include "driver.hpp"

// A file that the compiler could not make leaves a null.
#define PATH(name) extern const sentinel::Path name __attribute__((weak, visibility("hidden")));
PATH(sentinel_amx)
PATH(sentinel_avx512bf16)
PATH(sentinel_avx512)
PATH(sentinel_avx2)
PATH(sentinel_neonbf16)
PATH(sentinel_neon)
PATH(sentinel_portable)

namespace sentinel {

namespace {

const Path* const PATHS[] = {&sentinel_amx, &sentinel_avx512bf16, &sentinel_avx512, &sentinel_avx2, &sentinel_neonbf16, &sentinel_neon, &sentinel_portable};

}  // namespace

void visit_paths(void (*visit)(const Path& path, void* state), void* state) {
  for (const Path* path : PATHS) {
    if (path != nullptr) visit(*path, state);
  }
}

const Path* find_path(const char* name) {
  for (const Path* path : PATHS) {
    if (path != nullptr && path->is_supported() && (name == nullptr || std::strcmp(path->name, name) == 0)) return path;
  }
  return nullptr;
}

}  // namespace sentinel
