// Command coredns is CoreDNS with the plugins that a cluster DNS needs. The full
// set links the clients of four clouds, which no playground asks for.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/forward"
	_ "github.com/coredns/coredns/plugin/health"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/log"
	_ "github.com/coredns/coredns/plugin/loop"
	_ "github.com/coredns/coredns/plugin/metrics"
	_ "github.com/coredns/coredns/plugin/ready"
	_ "github.com/coredns/coredns/plugin/reload"
)

func main() {
	// The order of the directives is the order of the handlers.
	dnsserver.Directives = []string{
		"reload", "prometheus", "ready", "health", "errors", "log",
		"cache", "hosts", "kubernetes", "loop", "forward",
	}
	coremain.Run()
}
