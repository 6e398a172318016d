package playground

import "errors"

// WithHint adds a line to err that tells a person what to do about it. The
// hint is not part of the error's message; see [Hint].
func WithHint(err error, hint string) error { return &hinted{err: err, hint: hint} }

// Hint returns the hint of err or of the first error below it that has one,
// and the empty string when there is none.
func Hint(err error) string {
	if h, ok := errors.AsType[*hinted](err); ok {
		return h.hint
	}
	return ""
}

type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }
