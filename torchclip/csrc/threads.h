// Other threads: those that share the work on gradients, and Python's, which may run at the same time.
#pragma once

#include <algorithm>

#include "connection.h"

#if defined(__unix__) || defined(__APPLE__)
#define HAVE_DLFCN
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t kWorthThreads = 64 * 1024;          // the total number of elements below which one thread is faster
constexpr size_t kWorthReleasing = size_t(1) << 19;  // the number below which the GIL is not released

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

// The number of threads for a number of elements; results do not depend on it.  No Python code runs here.  One thread
// also handles many small tensors: with two, each would find half of them in the wrong cache, and checking tensors for
// overlaps takes longer than scaling them.
int usable_threads(size_t elements) {
    if (elements < kWorthThreads || openmp.parallel == nullptr || !torch.get_num_threads.is_direct() || is_forked())
        return 1;
    const Ref number(torch.get_num_threads());
    const long threads = number == nullptr ? -1 : PyLong_AsLong(number);
    PyErr_Clear();
    return int(std::max(1L, std::min(threads, 1024L)));
}

// Calls work(share, shares) in several threads, each with its own share.
template <class Work> void in_parallel(int threads, const Work& work) {
    const auto call = [](void* argument) {
        (*static_cast<const Work*>(argument))(size_t(openmp.get_thread_num()), size_t(openmp.get_num_threads()));
    };
    openmp.parallel(call, const_cast<Work*>(&work), unsigned(threads), 0);
}

// Releases the GIL if there is much to do.
class WithoutGil {
    PyThreadState* const state_;

  public:
    explicit WithoutGil(size_t elements) : state_(elements >= kWorthReleasing ? PyEval_SaveThread() : nullptr) {}
    ~WithoutGil() {
        if (state_ != nullptr) PyEval_RestoreThread(state_);
    }
    WithoutGil(const WithoutGil&) = delete;
    WithoutGil& operator=(const WithoutGil&) = delete;
};

}  // namespace
