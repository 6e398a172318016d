package link

import (
	"context"
	"net/http"
	"net/http/httptrace"
	"sync"
)

// gate lets one request at a time look for a connection to each server. Those
// that begin together then share the one that the first makes; net/http alone
// would make one for each of them and throw most away, and a handshake costs
// more bytes than ten questions. The zero gate lets everybody pass.
type gate []chan struct{} // by server; holds a token while the gate is free

func newGate(servers int) gate {
	g := make(gate, servers)
	for i := range g {
		g[i] = make(chan struct{}, 1)
		g[i] <- struct{}{}
	}
	return g
}

// roundTrip sends a request to server i by t. A wait for the gate ends with the
// request and with all that is in the registry.
func (g gate) roundTrip(t http.RoundTripper, req *http.Request, i int, all *registry) (*http.Response, error) {
	if g == nil {
		return t.RoundTrip(req)
	}
	if err := g.enter(req.Context(), i, all); err != nil {
		return nil, err
	}
	leave := sync.OnceFunc(func() { g[i] <- struct{}{} })
	defer leave()
	ctx := httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { leave() }})
	return t.RoundTrip(req.WithContext(ctx))
}

func (g gate) enter(ctx context.Context, i int, all *registry) error {
	select {
	case <-g[i]:
		return nil
	default:
	}
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	entry, ok := all.add(cancel)
	if !ok {
		return &dialError{ErrDown}
	}
	defer all.remove(entry)
	select {
	case <-g[i]:
		return nil
	case <-waiting.Done():
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return &dialError{ErrDown}
}
