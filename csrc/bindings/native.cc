// The extension module fedcodec._native: a table of contents.
#include <pybind11/pybind11.h>

#include "body.h"
#include "ops.h"
#include "roof.h"

PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used()) {
  m.doc() = "fedcodec's kernels (submodule ops) the calls that fuse them, and roofs.";
  fedcodec::bindings::bind_body(m);
  fedcodec::bindings::bind_ops(m);
  fedcodec::bindings::bind_roof(m);
}
