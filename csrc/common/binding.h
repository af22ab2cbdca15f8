// What the ops' bindings share.

#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/launch.h"

namespace vapt_fast {

namespace py = pybind11;

inline Dtype dtype_of(const std::string& name) {
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw py::value_error("dtype must be float16 or bfloat16, got " + name);
}

inline const char* name_of(Dtype dtype) { return dtype == Dtype::float16 ? "float16" : "bfloat16"; }

// The keyword arguments of a call, which are read one by one, by name. Pointers are addresses, 0 for null; tensors are
// tuples of an address and strides, or None.
class Keywords {
 public:
  Keywords(const char* function, const py::kwargs& given) : function_(function), given_(given) {}

  template <typename T>
  Keywords& read(const char* name, T& to) {
    if (!given_.contains(name)) throw py::type_error(function_ + ": " + name + " is missing");
    ++count_;
    const py::object value = given_[name];
    try {
      convert(value, to);
    } catch (const py::cast_error&) {
      throw py::type_error(function_ + ": " + name + " has the wrong type: " + py::repr(value).cast<std::string>());
    }
    return *this;
  }

  // Raises TypeError for an argument that was not read.
  void end() const {
    if (count_ != py::len(given_)) throw py::type_error(function_ + ": an argument is unknown");
  }

 private:
  template <typename T>
  static void convert(const py::object& from, T& to) {
    if constexpr (std::is_pointer_v<T>) {
      to = reinterpret_cast<T>(from.cast<std::uintptr_t>());
    } else {
      to = from.cast<T>();
    }
  }

  static void convert(const py::object& from, Tensor4& to) {
    view(from, to.data, to.batch_stride, to.row_stride, to.head_stride);
  }
  static void convert(const py::object& from, Rows& to) { view(from, to.data, to.row_stride); }

  template <typename T, typename... Strides>
  static void view(const py::object& from, T& data, Strides&... strides) {
    if (from.is_none()) return;
    if (!py::isinstance<py::tuple>(from) || py::len(from) != 1 + sizeof...(strides)) throw py::cast_error();
    const auto items = py::reinterpret_borrow<py::tuple>(from);
    convert(items[0], data);
    std::size_t next = 1;
    (convert(items[next++], strides), ...);
  }

  std::string function_;
  py::kwargs given_;
  std::size_t count_ = 0;
};

// Raises unless the status of ``call``, which describes the launch, is ok.
inline void raise_unless_ok(const Status& status, const std::string& call) {
  if (status.code == Code::ok) return;
  const std::string message = call + ": " + status.message;
  if (status.code == Code::invalid) throw py::value_error(message);
  if (status.code != Code::unsupported) throw std::runtime_error(message);
  PyErr_SetString(PyExc_NotImplementedError, message.c_str());
  throw py::error_already_set();
}

// Binds a launcher as a function of the keywords that the op's ``read(Keywords&, Arguments&)`` reads, and of ``stream``,
// a cudaStream_t as an integer. The op's ``describe`` says of its sizes what an error repeats.
template <typename Arguments>
void bind_launcher(py::module_& module, const char* name, Status (*launcher)(const Arguments&, Stream)) {
  module.def(name, [name, launcher](const py::kwargs& keywords) {
    Arguments arguments;
    Stream stream = nullptr;
    Keywords given(name, keywords);
    read(given, arguments);
    given.read("stream", stream).end();
    Status status;
    {
      const py::gil_scoped_release released;
      status = launcher(arguments, stream);
    }
    raise_unless_ok(status, std::string(name) + "(" + describe(arguments.sizes) + ")");
  });
}

}  // namespace vapt_fast
