// torch's threads, which share the work on many elements.
#pragma once

#include <cstddef>
#include <type_traits>

#if defined(__unix__) || defined(__APPLE__)
#define HAVE_DLFCN
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace {

// The number of elements below which one thread is faster.  One thread also handles many small tensors: with two, each
// would find half of them in the wrong cache, and checking tensors for overlaps takes longer than scaling them.
constexpr size_t kWorthThreads = 64 * 1024;

// The OpenMP library that torch has loaded, whatever its file name.  If the extension were linked to one, it could load
// a second library with its own threads.
struct {
    void (*parallel)(void (*work)(void*), void* argument, unsigned threads, unsigned flags) = nullptr;
    int (*get_thread_num)() = nullptr;
    int (*get_num_threads)() = nullptr;
} openmp;

#ifdef HAVE_DLFCN
const pid_t loaded_in = getpid();

// Looks up OpenMP in the libraries to which a library that is already loaded is linked.
void connect_openmp(const char* library) {
    void* const loaded = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (loaded == nullptr) return;
    const auto look_up = [loaded](auto& function, const char* name) {
        function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(loaded, name));
        return function != nullptr;
    };
    if (!look_up(openmp.get_thread_num, "omp_get_thread_num") ||
        !look_up(openmp.get_num_threads, "omp_get_num_threads") || !look_up(openmp.parallel, "GOMP_parallel"))
        openmp = {};
    // The handle is never closed, so that nothing can unload it.
}

// In a forked child, GNU's OpenMP has no threads and would wait for them forever, so a child uses one thread.
bool is_forked() { return getpid() != loaded_in; }
#else
void connect_openmp(const char*) {}
bool is_forked() { return false; }
#endif

// Whether there are any; results do not depend on it.
bool has_threads() { return openmp.parallel != nullptr && !is_forked(); }

// Calls work(share, shares) in several threads, each with its own share.
template <class Work> void in_parallel(int threads, const Work& work) {
    const auto call = [](void* argument) {
        (*static_cast<const Work*>(argument))(size_t(openmp.get_thread_num()), size_t(openmp.get_num_threads()));
    };
    openmp.parallel(call, const_cast<Work*>(&work), unsigned(threads), 0);
}

}  // namespace
