package playground

import (
	"context"
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync/atomic"
)

// Ports of FreePorts: below those that the kernel gives away by itself, and
// those of NodePort services.
const firstPort, portCount = 15000, 15000

// nextPort counts the ports that were tried, from anywhere.
var nextPort atomic.Uint32

// FreePorts returns n TCP ports that nobody listens on at ip, and that nobody
// gets by chance until they are used.
func FreePorts(ctx context.Context, ip string, n int) ([]int, error) {
	nextPort.CompareAndSwap(0, 1+rand.Uint32N(portCount))
	var (
		ports []int
		err   error
	)
	for range portCount {
		if len(ports) == n {
			return ports, nil
		}
		port := firstPort + int(nextPort.Add(1)%portCount)
		var l net.Listener
		if l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(ip, strconv.Itoa(port))); err == nil {
			ports = append(ports, port)
			_ = l.Close() // only its port was wanted
		}
	}
	return nil, fmt.Errorf("find %d free ports at %s: %w", n, ip, err)
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
