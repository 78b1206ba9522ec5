// The one place that knows how UCX reports failure.
#pragma once

#include <ucp/api/ucp.h>

#include <stdexcept>
#include <string>

namespace blsrdma {

class UcxError : public std::runtime_error {
 public:
  UcxError(const std::string& what, ucs_status_t status)
      : std::runtime_error(what + ": " + ucs_status_string(status)), status_(status) {}
  ucs_status_t status() const { return status_; }

 private:
  ucs_status_t status_;
};

inline void check(ucs_status_t status, const char* what) {
  if (status != UCS_OK) throw UcxError(what, status);
}

}  // namespace blsrdma
