// A call from XLA: its arrays, its numbers, its errors, and the threads it may share its work with.
// Knows nothing of what is computed.

#ifndef GLM_JAX_CALL_H_
#define GLM_JAX_CALL_H_

#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__SSE__)
#include <immintrin.h>
#endif

typedef XLA_FFI_Buffer Array;

static inline const Array* arg(const XLA_FFI_CallFrame* call, int index) {
  return (const Array*)call->args.args[index];
}

static inline const Array* result(const XLA_FFI_CallFrame* call, int index) {
  return (const Array*)call->rets.rets[index];
}

// Elements of the dimensions first … end - 1.
static inline int64_t extent(const Array* array, int first, int end) {
  int64_t size = 1;
  for (int axis = first; axis < end; ++axis) size *= array->dims[axis];
  return size;
}

// A number among the attributes: int64, or float32 by its bits.
static inline void* attribute(const XLA_FFI_CallFrame* call, const char* name) {
  for (int64_t i = 0; i < call->attrs.size; ++i) {
    const XLA_FFI_ByteSpan* span = call->attrs.names[i];
    if (span->len == strlen(name) && !memcmp(span->ptr, name, span->len)) {
      return ((XLA_FFI_Scalar*)call->attrs.attrs[i])->value;
    }
  }
  abort();  // Python passes them all
}

static inline int64_t integer(const XLA_FFI_CallFrame* call, const char* name) {
  return *(int64_t*)attribute(call, name);
}

static XLA_FFI_Error* failed(const XLA_FFI_CallFrame* call, const char* message) {
  XLA_FFI_Error_Create_Args args = {
      .struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE,
      .message = message,
      .errc = XLA_FFI_Error_Code_RESOURCE_EXHAUSTED,
  };
  return call->api->XLA_FFI_Error_Create(&args);
}

// XLA asks for the version before the first call; true where this was the question.
static int told_version(const XLA_FFI_CallFrame* call) {
  const XLA_FFI_InternalExtension* extension = call->extension_start;
  if (!extension || extension->type != XLA_FFI_Extension_Metadata) return 0;
  XLA_FFI_Metadata* metadata = ((const XLA_FFI_Metadata_Extension*)extension)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return 1;
}

// --- Threads -----------------------------------------------------------------------------------

// Memory of a thread, which grows and stays; NULL where there is none.
static float* own_memory(size_t count) {
  static _Thread_local float* memory;
  static _Thread_local size_t held;
  if (count > held) {
    free(memory);
    memory = aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    held = memory ? count : 0;
  }
  return memory;
}

typedef int (*Task)(void* job, int64_t index);  // false: no memory

typedef struct {
  Task task;
  void* job;
  int64_t count;
  atomic_int_fast64_t next, done;
  atomic_int users, failed;
} Work;

static void take_tasks(Work* work) {
  for (;;) {
    int64_t index = atomic_fetch_add(&work->next, 1);
    if (index >= work->count) return;
    if (!work->task(work->job, index)) atomic_store(&work->failed, 1);
    atomic_fetch_add(&work->done, 1);
  }
}

static void leave(Work* work) {
  if (atomic_fetch_sub(&work->users, 1) == 1) free(work);
}

static void help(void* data) {
#if defined(__SSE__)
  // Numbers too small to be normal are zeros on every thread, as on those of XLA that call us.
  unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
#endif
  take_tasks(data);
#if defined(__SSE__)
  _mm_setcsr(before);
#endif
  leave(data);
}

// Runs task(job, 0 … count - 1) on this thread and on XLA's idle ones. Which thread runs which is
// open, so no task may read what another one writes. False: there was no memory.
static int run_tasks(const XLA_FFI_CallFrame* call, int64_t count, Task task, void* job) {
  Work* work = malloc(sizeof(Work));
  if (!work) return 0;
  *work = (Work){.task = task, .job = job, .count = count, .users = 1};
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args asked = {
      .struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE,
      .ctx = call->ctx,
      .num_threads = &threads,
  };
  XLA_FFI_Error* error = call->api->XLA_FFI_ThreadPool_NumThreads(&asked);
  for (int64_t i = 1; !error && i < threads && i < count; ++i) {
    XLA_FFI_ThreadPool_Schedule_Args schedule = {
        .struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE,
        .ctx = call->ctx,
        .task = help,
        .data = work,
    };
    atomic_fetch_add(&work->users, 1);
    error = call->api->XLA_FFI_ThreadPool_Schedule(&schedule);
    if (error) atomic_fetch_sub(&work->users, 1);
  }
  if (error) {
    XLA_FFI_Error_Destroy_Args destroy = {
        .struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE,
        .error = error,
    };
    call->api->XLA_FFI_Error_Destroy(&destroy);
  }
  atomic_fetch_add(&work->users, 1);
  help(work);
  // A helper that has not begun by now finds nothing left, whenever it comes.
  for (int spins = 0; atomic_load(&work->done) < count; ++spins) {
    if (spins > 2000) sched_yield();  // another process may need this core for it
#if defined(__SSE__)
    _mm_pause();
#endif
  }
  int is_well = !atomic_load(&work->failed);
  leave(work);
  return is_well;
}

#endif  // GLM_JAX_CALL_H_
