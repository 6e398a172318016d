// Command client is a pod's program that needs its cluster: it looks for the
// API and for names where any pod does, and knows nothing of hubs.
//
//	client serve [NAME...]  answer /healthz; ask DNS for the names all the time
//	                        and tell at / what came of it
//	client lookup NAME      the addresses of a name, by the pod's resolv.conf
//	client hits HOST N      N connections to a web server; who answered how often
//	client list RESOURCE    names of the namespace's objects, by an informer
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

const (
	namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
	budget        = 20 * time.Second // of a command
	patience      = 5 * time.Second  // of a question, as resolvers have it
	pause         = 10 * time.Millisecond
	// again is the pause after a question that was lost: the kernel says six
	// times in a row that nobody listens, and once a second then.
	again       = 150 * time.Millisecond
	connections = 8 // at a time
	samples     = 1 << 16
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1) //nolint:forbidigo // this is main
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) > 0 && args[0] == "serve" {
		return serve(ctx, args[1:])
	}
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	switch {
	case len(args) == 2 && args[0] == "lookup":
		return lookup(ctx, args[1])
	case len(args) == 3 && args[0] == "hits":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return hits(ctx, args[1], n)
	case len(args) == 2 && args[0] == "list":
		return list(ctx, args[1])
	}
	return errors.New("want serve, lookup NAME, hits HOST N or list RESOURCE")
}

// answers is what came of questions about names that are there.
type answers struct {
	mu    sync.Mutex // guards the following
	tally tally
	took  []time.Duration // of the last ones
}

type tally struct {
	// Answered as it should be; Servfail; Wrong in another way, as "no such
	// name"; Lost without an answer.
	Answered, Servfail, Wrong, Lost int
	// Said is the last answer that was not right.
	Said     string `json:",omitempty"`
	P50, P99 string
}

func serve(ctx context.Context, names []string) error {
	a := &answers{}
	group, ctx := errgroup.WithContext(ctx)
	for _, name := range names {
		group.Go(func() error { return a.ask(ctx, dns.Fqdn(name)) })
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(a.sum()) })
	server := &http.Server{Addr: ":8080", Handler: mux, ReadHeaderTimeout: patience}
	context.AfterFunc(ctx, func() { _ = server.Close() })
	group.Go(func() error {
		if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return group.Wait()
}

// ask asks for one name until ctx ends, each time by a socket of its own.
func (a *answers) ask(ctx context.Context, name string) error {
	conf, err := dns.ClientConfigFromFile("/etc/resolv.conf")
	if err != nil {
		return err
	}
	if len(conf.Servers) == 0 {
		return errors.New("/etc/resolv.conf names no server")
	}
	client := &dns.Client{Timeout: patience}
	for {
		m := new(dns.Msg).SetQuestion(name, dns.TypeA)
		in, took, err := client.ExchangeContext(ctx, m, net.JoinHostPort(conf.Servers[0], "53"))
		select {
		case <-ctx.Done():
			return nil
		default:
			a.count(in, took, err)
		}
		wait := pause
		if err != nil {
			wait = again
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (a *answers) count(in *dns.Msg, took time.Duration, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case err != nil:
		a.tally.Lost++
		a.tally.Said = err.Error()
		return
	case in.Rcode == dns.RcodeServerFailure:
		a.tally.Servfail++
		a.tally.Said = in.String()
	case in.Rcode != dns.RcodeSuccess || len(in.Answer) == 0:
		a.tally.Wrong++
		a.tally.Said = in.String()
	default:
		a.tally.Answered++
	}
	if len(a.took) == samples {
		a.took = a.took[1:]
	}
	a.took = append(a.took, took)
}

func (a *answers) sum() tally {
	a.mu.Lock()
	defer a.mu.Unlock()
	t := a.tally
	if took := slices.Sorted(slices.Values(a.took)); len(took) > 0 {
		t.P50, t.P99 = took[len(took)/2].String(), took[len(took)*99/100].String()
	}
	return t
}

func lookup(ctx context.Context, name string) error {
	addresses, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		return err
	}
	slices.Sort(addresses)
	fmt.Println(strings.Join(addresses, " "))
	return nil
}

// hits counts which pods answer n requests, each by a connection of its own,
// so that each is led anew.
func hits(ctx context.Context, host string, n int) error {
	addresses, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	var mu sync.Mutex // guards who
	who := map[string]int{}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(connections)
	for range n {
		group.Go(func() error {
			pod, err := get(ctx, client, "http://"+net.JoinHostPort(addresses[0], "80")+"/")
			mu.Lock()
			defer mu.Unlock()
			who[pod]++
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, pod := range slices.Sorted(maps.Keys(who)) {
		fmt.Println(pod, who[pod])
	}
	return nil
}

func get(ctx context.Context, client *http.Client, url string) (pod string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct{ Pod string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return "", fmt.Errorf("answer of %s: %w", url, err)
	}
	return answer.Pod, nil
}

// list prints what an informer of client-go holds once it has synced. What the
// pod may not read is an error.
func list(ctx context.Context, resource string) error {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		return err
	}
	namespace, err := os.ReadFile(namespaceFile)
	if err != nil {
		return err
	}
	client, err := dynamic.NewForConfig(cfg)
	if err != nil {
		return err
	}
	of := schema.GroupVersionResource{Version: "v1", Resource: resource}
	informer := dynamicinformer.NewFilteredDynamicInformer(client, of, string(namespace), 0, nil, nil).Informer()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err = informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) { cancel(err) })
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() { defer close(done); informer.RunWithContext(ctx) }()
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		<-done
		return fmt.Errorf("list %s: %w", resource, context.Cause(ctx))
	}
	for _, key := range slices.Sorted(slices.Values(informer.GetStore().ListKeys())) {
		fmt.Println(key)
	}
	cancel(nil)
	<-done
	return nil
}
