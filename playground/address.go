package playground

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
)

// freePorts returns n TCP ports that nobody listens on at ip. They are all
// held open until the last is found, so that they differ.
func freePorts(ctx context.Context, ip string, n int) ([]int, error) {
	var ports []int
	for range n {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(ip, "0"))
		if err != nil {
			return nil, fmt.Errorf("find a free port at %s: %w", ip, err)
		}
		defer l.Close() //nolint:errcheck // only its port was wanted
		addr, err := netip.ParseAddrPort(l.Addr().String())
		if err != nil {
			return nil, err
		}
		ports = append(ports, int(addr.Port()))
	}
	return ports, nil
}

// firstServiceIP returns the address that the API server gives to the Service
// "kubernetes".
func firstServiceIP(cidr string) (string, error) {
	prefix, err := netip.ParsePrefix(cidr)
	if err != nil {
		return "", fmt.Errorf("parse service CIDR: %w", err)
	}
	return prefix.Masked().Addr().Next().String(), nil
}

// insecureClient is for health checks of servers on loopback that make their
// certificates themselves. Nothing that it reads is believed.
func insecureClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // see above
	}}
}

func orDefault(value, fallback string) string {
	if value == "" {
		return fallback
	}
	return value
}
