// Memory of the CPU kernels: of plain C, which grows in place, freed with its scope, and std::bad_alloc if there is none.
#pragma once
#include <cstdlib>
#include <new>
#include "common/host_device.h"

namespace text3d {
namespace TEXT3D_ISA {

// T is plain data; what is new is not initialized.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(size_t count) { resize(count); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { std::free(data_); }

  void resize(size_t count) {
    void* data = std::realloc(data_, (count ? count : 1) * sizeof(T));
    if (!data) throw std::bad_alloc();
    data_ = static_cast<T*>(data);
  }
  void swap(Array& other) {
    T* data = data_;
    data_ = other.data_, other.data_ = data;
  }
  operator T*() const { return data_; }

 private:
  T* data_ = nullptr;
};

}  // namespace TEXT3D_ISA
}  // namespace text3d
