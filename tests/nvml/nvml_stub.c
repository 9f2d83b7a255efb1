/* A stand-in for libnvidia-ml.so.1 on machines without a GPU, loaded by the real nvidia-ml-py.
 * NVML_STUB names a file with one GPU a line: "UUID name of the device". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef struct { char uuid[96]; char name[96]; } Gpu;
enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, DRIVER_NOT_LOADED = 9 };

static Gpu gpus[64];
static unsigned int count;
static int initialised;

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
  (void)flags;
  const char *path = getenv("NVML_STUB");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return DRIVER_NOT_LOADED;
  char line[200];
  count = 0;
  while (count < 64 && fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = 0;
    if (sscanf(line, "%95s %95[^\n]", gpus[count].uuid, gpus[count].name) == 2) count++;
  }
  fclose(file);
  initialised = 1;
  return OK;
}

nvmlReturn_t nvmlShutdown(void) { initialised = 0; return OK; }

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *n) {
  if (!initialised) return UNINITIALIZED;
  *n = count;
  return OK;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) {
  if (index >= count) return INVALID_ARGUMENT;
  *device = &gpus[index];
  return OK;
}

nvmlReturn_t nvmlDeviceGetUUID(void *device, char *text, unsigned int length) {
  snprintf(text, length, "%s", ((Gpu *)device)->uuid);
  return OK;
}

nvmlReturn_t nvmlDeviceGetName(void *device, char *text, unsigned int length) {
  snprintf(text, length, "%s", ((Gpu *)device)->name);
  return OK;
}

const char *nvmlErrorString(nvmlReturn_t code) {
  return code == DRIVER_NOT_LOADED ? "Driver Not Loaded" : "stub error";
}
