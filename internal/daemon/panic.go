package daemon

import (
	"errors"
	"fmt"
	"runtime"
)

// PanicCause describes what was panicked with, for a log. Only the runtime's
// own errors are known to quote nothing that is secret; of others it is the
// type.
func PanicCause(cause any) string {
	if err, ok := cause.(error); ok {
		if fault, ok := errors.AsType[runtime.Error](err); ok {
			return fault.Error()
		}
	}
	return fmt.Sprintf("%T", cause)
}
