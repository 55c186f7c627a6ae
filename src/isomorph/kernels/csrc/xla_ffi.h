// The part of XLA's C interface for foreign functions that our handlers use.
//
// Declared here, after xla/ffi/api/c_api.h, because packages are built where jaxlib is not installed. XLA keeps the
// interface binary compatible, states its version and sizes at run time (see `compatible`), and tests/kernels/test_jax.py
// compares these declarations with the header of the jaxlib that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace isomorph::xla {

constexpr int kMajor = 0, kMinor = 1;

struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};
constexpr int kMetadataExtension = 1;

struct ApiVersion {
  size_t struct_size;
  Extension* extensions;
  int major_version, minor_version;
};

struct Metadata {
  size_t struct_size;
  ApiVersion api_version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum DataType : int { kFloat16 = 10, kFloat32 = 11, kBfloat16 = 16 };

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  int dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Span {
  const char* data;
  size_t size;
};

struct Scalar {
  int dtype;
  void* value;
};

struct Buffers {  // arguments or results
  size_t struct_size;
  Extension* extensions;
  int64_t count;
  int* types;
  void** items;
};

struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t count;
  int* types;
  Span** names;
  void** items;
};

struct Error;

struct ErrorArguments {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  int code;
};
constexpr int kInvalidArgument = 3;

struct ScheduleArguments {
  size_t struct_size;
  Extension* extensions;
  void* context;
  void (*task)(void*);
  void* data;
};

struct ThreadsArguments {
  size_t struct_size;
  Extension* extensions;
  void* context;
  int64_t* count;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  ApiVersion version;
  const void* internal;
  Error* (*create_error)(ErrorArguments*);
  void* between[10];  // what our handlers do not use
  Error* (*schedule)(ScheduleArguments*);
  Error* (*threads)(ThreadsArguments*);
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace isomorph::xla
