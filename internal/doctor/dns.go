package doctor

import (
	"context"
	"errors"
	"net"
	"strconv"
)

// names asks the hub's DNS for a name that every cluster has.
func (s *Settings) names(ctx context.Context) Result {
	if !s.DNS || s.DummyIP == "" {
		return ok("the hub answers no DNS, as it was told")
	}
	at := net.JoinHostPort(s.DummyIP, strconv.Itoa(s.DNSPort))
	resolver := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, at)
	}}
	name := "kubernetes.default.svc." + s.Domain + "."
	addrs, err := resolver.LookupHost(ctx, name)
	var failed *net.DNSError
	switch {
	case err == nil:
		return ok("%s is %s at %s", name, addrs[0], at)
	case errors.As(err, &failed) && failed.IsNotFound:
		return warn("%s knows no %s", at, name).
			so("is --cluster-domain that of the cluster? Services come from the cloud once", "yurtadm status")
	}
	return warn("%s answers no DNS: %v", at, err).
		so("another program may have port 53; the hub's log says so", "ss -lunp 'sport = :53'; journalctl -u yurthub | grep DNS")
}
