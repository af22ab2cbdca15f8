// Checks of a launcher's arguments.

#pragma once

#include <cstdint>
#include <cstdio>

#include "common/launch.h"

namespace vapt_fast {

// Checks arguments one by one and keeps the first error.
class Check {
 public:
  // A tensor (batch, rows, heads, D) of elements of ``bytes`` bytes.
  void tensor(const char* name, const Tensor4& tensor, std::int64_t batch, std::int64_t rows, std::int64_t heads,
              std::int64_t bytes) {
    if (batch == 0 || rows == 0 || heads == 0) {
      return;
    }
    pointer(name, tensor.data);
    const auto misaligned = [bytes](std::int64_t count, std::int64_t stride) {
      return count > 1 && stride * bytes % 16;
    };
    if (misaligned(batch, tensor.batch_stride) || misaligned(rows, tensor.row_stride) ||
        misaligned(heads, tensor.head_stride)) {
      fail(Code::invalid, "every row of %s must begin at a multiple of 16 bytes", name);
    }
  }

  // A contiguous tensor of ``count`` elements that begins at a multiple of ``alignment`` bytes.
  void pointer(const char* name, const void* data, std::int64_t count = 1, std::uintptr_t alignment = 16) {
    if (count == 0) {
      return;
    }
    if (data == nullptr) {
      fail(Code::invalid, "%s must not be null", name);
    } else if (reinterpret_cast<std::uintptr_t>(data) % alignment) {
      fail(Code::invalid, "%s must begin at a multiple of %d bytes", name, static_cast<int>(alignment));
    }
  }

  // The same of a tensor that may be absent.
  void optional(const char* name, const void* data) { pointer(name, data, data != nullptr); }

  template <typename... Arguments>
  void fail(Code code, const char* format, Arguments... arguments) {
    if (ok()) {
      status_.code = code;
      std::snprintf(status_.message, sizeof status_.message, format, arguments...);
    }
  }

  bool ok() const { return status_.code == Code::ok; }
  const Status& status() const { return status_; }

 private:
  Status status_;
};

}  // namespace vapt_fast
