/* A stand-in for libnvidia-ml.so.1 on machines without a GPU, loaded by the real nvidia-ml-py.
 *
 * NVML_STUB_DIR names a directory; all in it is read anew at each call (see stub.py):
 *   gpus    a line per GPU: uuid|name|total|base_used|utilisation|state|mig
 *           utilisation: percent, or - (not supported)
 *           state: ok, lost, fail, hang, gone, nopids, hostpids
 *           mig: -, or MIG-uuid:bytes,MIG-uuid:bytes
 *   use-*   lines: uuid pid bytes from until [linger]
 *   init    fail, mismatch (every call fails so, as after a driver reload), hang (nvmlInit only)
 *   quirks  words: no-v2, no-processes, no-process-memory, no-memory, reserved=BYTES
 *   calls   if it is there, each call adds its name */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef unsigned long long u64;
enum {
  OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15,
  LIB_RM_VERSION_MISMATCH = 18, ARGUMENT_VERSION_MISMATCH = 25, UNKNOWN = 999
};
enum { MAX_GPUS = 64, MAX_MIG = 7, MAX_PROCESSES = 512, HOST_PIDS = 4000000 };

typedef struct { char uuid[96]; u64 total; } Instance;
typedef struct {
  char uuid[96], name[96], state[16];
  u64 total, base;
  int utilisation, migs; /* -1: not supported; 0: not divided */
  Instance mig[MAX_MIG];
} Gpu;
typedef struct { unsigned int version; u64 total, reserved, free, used; } Memory2;
typedef struct { u64 total, free, used; } Memory1;
typedef struct { unsigned int pid; u64 memory; unsigned int gi, ci; } Process;
typedef struct { unsigned int gpu, memory; } Utilisation;
/* What an opaque handle points to. It outlives the GPU; handles are never freed. */
typedef struct { char uuid[96]; } Handle;
/* A handle looked up: its GPU, and the instance on it (-1: the GPU itself). */
typedef struct { Gpu gpu; int index, instance; } Device;

static int initialised;
static Handle handles[1024];

/* --- files --- */

static FILE *open_file(const char *name) {
  const char *directory = getenv("NVML_STUB_DIR");
  char path[4096];
  if (!directory) return NULL;
  snprintf(path, sizeof path, "%s/%s", directory, name);
  return fopen(path, "re");
}

static void read_text(const char *name, char *text, size_t size) {
  FILE *file = open_file(name);
  size_t length = file ? fread(text, 1, size - 1, file) : 0;
  if (file) fclose(file);
  text[length] = 0;
}

static void note_call(const char *name) {
  const char *directory = getenv("NVML_STUB_DIR");
  char path[4096], line[128];
  if (!directory) return;
  snprintf(path, sizeof path, "%s/calls", directory);
  int file = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
  if (file < 0) return;
  int length = snprintf(line, sizeof line, "%s\n", name);
  if (write(file, line, length) != length) abort();
  close(file);
}

static int has_quirk(const char *word, u64 *value) {
  char text[512], *rest;
  read_text("quirks", text, sizeof text);
  for (char *w = strtok_r(text, " \n", &rest); w; w = strtok_r(NULL, " \n", &rest)) {
    size_t length = strlen(word);
    if (strncmp(w, word, length)) continue;
    if (value && w[length] == '=') *value = strtoull(w + length + 1, NULL, 10);
    return 1;
  }
  return 0;
}

static void read_mig(Gpu *gpu, char *text) {
  char *rest;
  for (char *w = strtok_r(text, ",", &rest); w && gpu->migs < MAX_MIG; w = strtok_r(NULL, ",", &rest)) {
    Instance *instance = &gpu->mig[gpu->migs];
    if (sscanf(w, "%95[^:]:%llu", instance->uuid, &instance->total) == 2) gpu->migs++;
  }
}

/* The GPUs that are there, in NVML's order; -1 where there is no driver. */
static int read_gpus(Gpu *gpus) {
  FILE *file = open_file("gpus");
  char line[2048], utilisation[16], mig[1024];
  int count = 0;
  if (!file) return -1;
  while (count < MAX_GPUS && fgets(line, sizeof line, file)) {
    Gpu *gpu = &gpus[count];
    memset(gpu, 0, sizeof *gpu);
    if (sscanf(line, "%95[^|]|%95[^|]|%llu|%llu|%15[^|]|%15[^|]|%1023[^|\n]", gpu->uuid, gpu->name,
               &gpu->total, &gpu->base, utilisation, gpu->state, mig) != 7) continue;
    if (!strcmp(gpu->state, "gone")) continue;
    gpu->utilisation = !strcmp(utilisation, "-") ? -1 : atoi(utilisation);
    read_mig(gpu, mig);
    count++;
  }
  fclose(file);
  return count;
}

/* --- who uses what --- */

static int is_alive(long pid) {
  char path[64], text[512], *end;
  if (kill(pid, 0) && errno != EPERM) return 0;
  snprintf(path, sizeof path, "/proc/%ld/stat", pid);
  FILE *file = fopen(path, "re");
  if (!file) return 0;
  text[fread(text, 1, sizeof text - 1, file)] = 0;
  fclose(file);
  end = strrchr(text, ')');
  return end && end[1] && !strchr("ZX", end[2]);
}

static void add_process(Process *processes, unsigned int *count, unsigned int pid, u64 memory) {
  for (unsigned int i = 0; i < *count; i++)
    if (processes[i].pid == pid) { processes[i].memory += memory; return; }
  if (*count < MAX_PROCESSES) processes[(*count)++] = (Process){pid, memory, -1, -1};
}

static void read_use(FILE *file, const char *uuid, u64 *used, Process *processes, unsigned int *count) {
  struct timespec at;
  char line[512], name[96], from[64], until[64], linger[16];
  clock_gettime(CLOCK_REALTIME, &at);
  double now = at.tv_sec + at.tv_nsec / 1e9;
  while (fgets(line, sizeof line, file)) {
    long pid;
    u64 memory;
    int n = sscanf(line, "%95s %ld %llu %63s %63s %15s", name, &pid, &memory, from, until, linger);
    if (n < 5 || strcmp(name, uuid) || now < strtod(from, NULL) || now >= strtod(until, NULL)) continue;
    int alive = pid > 0 && is_alive(pid);
    if (pid > 0 && !alive && n < 6) continue;
    *used += memory;
    if (alive) add_process(processes, count, pid, memory);
  }
}

/* Memory that uses take on a device, and the processes that have it. */
static u64 read_uses(const char *uuid, Process *processes, unsigned int *count) {
  const char *directory = getenv("NVML_STUB_DIR");
  DIR *listing = directory ? opendir(directory) : NULL;
  struct dirent *entry;
  u64 used = 0;
  while (listing && (entry = readdir(listing))) {
    FILE *file = strncmp(entry->d_name, "use-", 4) ? NULL : open_file(entry->d_name);
    if (!file) continue;
    read_use(file, uuid, &used, processes, count);
    fclose(file);
  }
  if (listing) closedir(listing);
  return used;
}

static u64 uses_of(const Device *device, Process *processes, unsigned int *count) {
  if (device->instance >= 0) return read_uses(device->gpu.mig[device->instance].uuid, processes, count);
  u64 used = read_uses(device->gpu.uuid, processes, count);
  for (int i = 0; i < device->gpu.migs; i++) used += read_uses(device->gpu.mig[i].uuid, processes, count);
  return used;
}

/* --- calls --- */

static nvmlReturn_t driver_state(void) {
  char text[16];
  read_text("init", text, sizeof text);
  if (!strncmp(text, "fail", 4)) return DRIVER_NOT_LOADED;
  if (!strncmp(text, "mismatch", 8)) return LIB_RM_VERSION_MISMATCH;
  return OK;
}

static nvmlReturn_t enter(const char *name) {
  note_call(name);
  return initialised ? driver_state() : UNINITIALIZED;
}

static nvmlReturn_t find(const char *uuid, Device *device) {
  static Gpu gpus[MAX_GPUS];
  int count = read_gpus(gpus);
  if (count < 0) return DRIVER_NOT_LOADED;
  for (int i = 0; i < count; i++)
    for (int instance = -1; instance < gpus[i].migs; instance++)
      if (!strcmp(uuid, instance < 0 ? gpus[i].uuid : gpus[i].mig[instance].uuid)) {
        *device = (Device){gpus[i], i, instance};
        return strcmp(gpus[i].state, "lost") ? OK : GPU_IS_LOST;
      }
  return NOT_FOUND;
}

/* The start of each call that has a handle. */
static nvmlReturn_t look_at(const char *name, void *handle, Device *device) {
  nvmlReturn_t state = enter(name);
  if (state != OK) return state;
  if (!handle) return INVALID_ARGUMENT;
  state = find(((Handle *)handle)->uuid, device);
  return state == NOT_FOUND ? GPU_IS_LOST : state;
}

/* The start of each call that reads what changes. */
static nvmlReturn_t measure(const char *name, void *handle, Device *device) {
  nvmlReturn_t state = look_at(name, handle, device);
  if (state != OK) return state;
  while (!strcmp(device->gpu.state, "hang")) pause();
  return strcmp(device->gpu.state, "fail") ? OK : UNKNOWN;
}

static nvmlReturn_t give_handle(const char *uuid, void **handle) {
  for (int i = 0; i < 1024; i++) {
    if (!handles[i].uuid[0]) snprintf(handles[i].uuid, sizeof handles[i].uuid, "%s", uuid);
    if (!strcmp(handles[i].uuid, uuid)) { *handle = &handles[i]; return OK; }
  }
  return UNKNOWN;
}

static nvmlReturn_t give_text(char *text, unsigned int size, const char *format, ...) {
  va_list words;
  va_start(words, format);
  int length = vsnprintf(text, size, format, words);
  va_end(words);
  return length < (int)size ? OK : INSUFFICIENT_SIZE;
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  static Gpu gpus[MAX_GPUS];
  char text[16];
  note_call("nvmlInit");
  for (read_text("init", text, sizeof text); !strncmp(text, "hang", 4);) pause();
  nvmlReturn_t state = driver_state();
  if (state == OK && read_gpus(gpus) < 0) state = DRIVER_NOT_LOADED;
  if (state == OK) initialised++;
  return state;
}
nvmlReturn_t nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
nvmlReturn_t nvmlInit(void) { return nvmlInitWithFlags(0); }

nvmlReturn_t nvmlShutdown(void) {
  note_call("nvmlShutdown");
  if (!initialised) return UNINITIALIZED;
  initialised--;
  return OK;
}

const char *nvmlErrorString(nvmlReturn_t code) {
  return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "stub error";
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *text, unsigned int size) {
  nvmlReturn_t state = enter("nvmlSystemGetDriverVersion");
  return state != OK ? state : give_text(text, size, "999.99");
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count) {
  static Gpu gpus[MAX_GPUS];
  nvmlReturn_t state = enter("nvmlDeviceGetCount");
  int n = read_gpus(gpus);
  if (state == OK && n < 0) state = DRIVER_NOT_LOADED;
  *count = state == OK ? n : 0;
  return state;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
  static Gpu gpus[MAX_GPUS];
  nvmlReturn_t state = enter("nvmlDeviceGetHandleByIndex");
  if (state != OK) return state;
  int count = read_gpus(gpus);
  if (count < 0) return DRIVER_NOT_LOADED;
  if (index >= (unsigned int)count) return INVALID_ARGUMENT;
  if (!strcmp(gpus[index].state, "lost")) return GPU_IS_LOST;
  return give_handle(gpus[index].uuid, handle);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  Device device;
  nvmlReturn_t state = enter("nvmlDeviceGetHandleByUUID");
  if (state == OK) state = find(uuid, &device);
  return state == OK ? give_handle(uuid, handle) : state;
}

nvmlReturn_t nvmlDeviceGetUUID(void *handle, char *text, unsigned int size) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetUUID", handle, &device);
  return state != OK ? state : give_text(text, size, "%s", ((Handle *)handle)->uuid);
}

nvmlReturn_t nvmlDeviceGetName(void *handle, char *text, unsigned int size) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetName", handle, &device);
  if (state != OK) return state;
  return give_text(text, size, device.instance < 0 ? "%s" : "%s MIG 1g", device.gpu.name);
}

nvmlReturn_t nvmlDeviceGetIndex(void *handle, unsigned int *index) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetIndex", handle, &device);
  if (state == OK) *index = device.instance < 0 ? device.index : device.instance;
  return state;
}

static nvmlReturn_t memory_of(const char *name, void *handle, Memory2 *memory) {
  Device device;
  Process processes[MAX_PROCESSES];
  unsigned int count = 0;
  nvmlReturn_t state = measure(name, handle, &device);
  if (state != OK) return state;
  if (has_quirk("no-memory", NULL)) return NOT_SUPPORTED;
  memory->reserved = 0;
  has_quirk("reserved", &memory->reserved);
  memory->total = device.instance < 0 ? device.gpu.total : device.gpu.mig[device.instance].total;
  memory->used = (device.instance < 0 ? device.gpu.base : 0) + uses_of(&device, processes, &count);
  u64 taken = memory->used + memory->reserved;
  memory->free = taken < memory->total ? memory->total - taken : 0;
  return OK;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(void *handle, Memory1 *memory) {
  Memory2 all;
  nvmlReturn_t state = memory_of("nvmlDeviceGetMemoryInfo", handle, &all);
  if (state == OK) *memory = (Memory1){all.total, all.free, all.used + all.reserved};
  return state;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *memory) {
  if (has_quirk("no-v2", NULL)) return FUNCTION_NOT_FOUND;
  if (memory->version != (2u << 24 | sizeof *memory)) return ARGUMENT_VERSION_MISMATCH;
  return memory_of("nvmlDeviceGetMemoryInfo_v2", handle, memory);
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(void *handle, Utilisation *utilisation) {
  Device device;
  nvmlReturn_t state = measure("nvmlDeviceGetUtilizationRates", handle, &device);
  if (state != OK) return state;
  if (device.gpu.utilisation < 0 || device.gpu.migs) return NOT_SUPPORTED;
  *utilisation = (Utilisation){device.gpu.utilisation, 0};
  return OK;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned int *room, Process *list) {
  Device device;
  Process processes[MAX_PROCESSES];
  unsigned int count = 0;
  nvmlReturn_t state = measure("nvmlDeviceGetComputeRunningProcesses", handle, &device);
  if (state != OK) return state;
  if (has_quirk("no-processes", NULL)) return NOT_SUPPORTED;
  uses_of(&device, processes, &count);
  if (!strcmp(device.gpu.state, "nopids")) count = 0;
  unsigned int offered = *room;
  *room = count;
  if (count > offered || (count && !list)) return INSUFFICIENT_SIZE;
  for (unsigned int i = 0; i < count; i++) {
    list[i] = processes[i];
    if (!strcmp(device.gpu.state, "hostpids")) list[i].pid += HOST_PIDS;
    if (has_quirk("no-process-memory", NULL)) list[i].memory = ~0ull;
  }
  return OK;
}
nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned int *room, Process *list) {
  return nvmlDeviceGetComputeRunningProcesses_v3(handle, room, list);
}

nvmlReturn_t nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetMigMode", handle, &device);
  if (state != OK) return state;
  if (!device.gpu.migs) return NOT_SUPPORTED;
  *current = *pending = 1;
  return OK;
}

nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned int *count) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetMaxMigDeviceCount", handle, &device);
  if (state == OK) *count = device.gpu.migs ? MAX_MIG : 0;
  return state;
}

nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned int index, void **instance) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetMigDeviceHandleByIndex", handle, &device);
  if (state != OK) return state;
  if (index >= (unsigned int)device.gpu.migs) return NOT_FOUND;
  return give_handle(device.gpu.mig[index].uuid, instance);
}

nvmlReturn_t nvmlDeviceIsMigDeviceHandle(void *handle, unsigned int *is_mig) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceIsMigDeviceHandle", handle, &device);
  if (state == OK) *is_mig = device.instance >= 0;
  return state;
}

nvmlReturn_t nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **parent) {
  Device device;
  nvmlReturn_t state = look_at("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, &device);
  if (state != OK) return state;
  return device.instance < 0 ? INVALID_ARGUMENT : give_handle(device.gpu.uuid, parent);
}
