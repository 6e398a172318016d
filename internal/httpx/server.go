package httpx

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Limits of every server. A header of a Kubernetes request is small; a
// client that needs longer than these to send one is broken or hostile.
const (
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 64 << 10
	maxStreams        = 250 // as kube-apiserver's default
	maxFrame          = 64 << 10
	maxUpload         = 256 << 10 // of bodies that nobody has read yet, per stream
	// A client that is gone without a word is noticed by a ping.
	pingAfter   = 45 * time.Second
	pingTimeout = 15 * time.Second
)

// Server serves Handler on Listener until the context of Run ends.
type Server struct {
	// Listener is owned by the server from the call of Run on.
	Listener net.Listener
	Handler  http.Handler
	// TLS is nil for plain HTTP. NextProtos is set by the server, and only
	// then may it be empty.
	TLS *tls.Config
	// Grace is how long requests may take to finish after the context
	// ended, before their connections are cut. Zero cuts at once.
	Grace time.Duration
	// Log receives the complaints of net/http, such as failed handshakes,
	// at debug level. Nil drops them.
	Log *slog.Logger
	// Conns bounds the connections; all zero means DefaultConnLimits.
	Conns ConnLimits
	// Refused, when set, is told of each connection that was refused or
	// closed for want of room, and which limit that was.
	Refused func(limit string)
	// ConnContext, when set, derives the context of a new connection.
	ConnContext func(ctx context.Context, c net.Conn) context.Context
}

// Run serves until ctx ends and then returns nil, after all handlers have
// returned or Grace is over. Any other end of the listener is an error.
//
// The contexts of requests are not derived from ctx, so that a request may
// finish during the grace; streams that should end at once watch ctx
// themselves or are cut when the grace is over.
func (s *Server) Run(ctx context.Context) error {
	log := s.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	listener := newConns(s.Listener, s.Conns, s.Refused)
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(s.TLS != nil)
	srv := &http.Server{
		Handler:           s.Handler,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnState:         listener.follow,
		Protocols:         &protocols,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxStreams, MaxReadFrameSize: maxFrame,
			MaxReceiveBufferPerStream: maxUpload, MaxReceiveBufferPerConnection: 4 * maxUpload,
			SendPingTimeout: pingAfter, PingTimeout: pingTimeout, // writes are the guest's to bound
		},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			g := guestOf(c)
			if s.ConnContext != nil {
				if c == net.Conn(g) {
					c = g.Conn // as the listener made it
				}
				ctx = s.ConnContext(ctx, c)
			}
			return context.WithValue(ctx, guestKey{}, g)
		},
	}

	done := make(chan error, 1)
	go func() {
		if s.TLS == nil {
			done <- srv.Serve(listener)
			return
		}
		srv.TLSConfig = s.TLS.Clone()
		done <- srv.ServeTLS(listener, "", "")
	}()
	select {
	case err := <-done:
		return fmt.Errorf("serve on %s: %w", s.Listener.Addr(), err)
	case <-ctx.Done():
	}

	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.Grace)
	defer cancel()
	err := srv.Shutdown(grace)
	if errors.Is(err, context.DeadlineExceeded) {
		err = srv.Close()
	}
	<-done //nolint:errcheck // http.ErrServerClosed, since it was told to stop
	if err != nil {
		return fmt.Errorf("stop serving on %s: %w", s.Listener.Addr(), err)
	}
	return nil
}
