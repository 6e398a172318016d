package httpx

import (
	"bufio"
	"net"
	"net/http"
)

// AccessRecorder is a ResponseWriter that remembers what was replied. It is
// used by one handler at a time, like the writer below it.
//
// It always offers Flush and Hijack; what the writer below cannot do is
// [http.ErrNotSupported] through [http.ResponseController].
type AccessRecorder struct {
	http.ResponseWriter
	// Status is the code of the reply, 0 while none has been written and
	// 101 after a hijack.
	Status int
	// Bytes counts the body as handed to the writer below. What goes over
	// a hijacked connection is not counted.
	Bytes int64
}

// NewAccessRecorder records what is written to w.
func NewAccessRecorder(w http.ResponseWriter) *AccessRecorder {
	return &AccessRecorder{ResponseWriter: w}
}

// WriteHeader records the first final code and passes it on.
func (a *AccessRecorder) WriteHeader(code int) {
	if a.Status == 0 && (code >= 200 || code == http.StatusSwitchingProtocols) {
		a.Status = code
	}
	a.ResponseWriter.WriteHeader(code)
}

// Write counts the bytes that the writer below took.
func (a *AccessRecorder) Write(p []byte) (int, error) {
	if a.Status == 0 {
		a.Status = http.StatusOK
	}
	n, err := a.ResponseWriter.Write(p)
	a.Bytes += int64(n)
	return n, err
}

// Flush implements [http.Flusher] for callers that do not use
// [http.ResponseController].
func (a *AccessRecorder) Flush() {
	_ = a.FlushError()
}

// FlushError flushes the writer below. A flush commits the header.
func (a *AccessRecorder) FlushError() error {
	if a.Status == 0 {
		a.Status = http.StatusOK
	}
	return http.NewResponseController(a.ResponseWriter).Flush()
}

// Hijack hands the connection of the writer below to the caller.
func (a *AccessRecorder) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err == nil {
		a.Status = http.StatusSwitchingProtocols
	}
	return conn, rw, err
}

// Unwrap lets [http.ResponseController] find the writer below.
func (a *AccessRecorder) Unwrap() http.ResponseWriter { return a.ResponseWriter }
