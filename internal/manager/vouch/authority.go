package vouch

import (
	"context"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"
	"sigs.k8s.io/controller-runtime/pkg/client"
)

// Authentication is the ConfigMap in which the API server publishes by which
// authorities it knows its clients, in namespace kube-system.
const Authentication = "extension-apiserver-authentication"

// refresh is how old the authorities may be.
const refresh = time.Minute

// authority knows the authorities of nodes' certificates.
type authority struct {
	read  client.Reader
	clock clock.PassiveClock

	mu   sync.Mutex // guards the following
	pool *x509.CertPool
	at   time.Time
}

func (a *authority) roots(ctx context.Context) (*x509.CertPool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.clock.Now()
	if a.pool != nil && now.Sub(a.at) < refresh {
		return a.pool, nil
	}
	var m corev1.ConfigMap
	if err := a.read.Get(ctx, types.NamespacedName{Namespace: metav1.NamespaceSystem, Name: Authentication}, &m); err != nil {
		return nil, fmt.Errorf("read the authorities of clients: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(m.Data["client-ca-file"])) {
		return nil, fmt.Errorf("ConfigMap %s/%s has no client-ca-file: the API server takes no client certificates", m.Namespace, m.Name)
	}
	a.pool, a.at = pool, now
	return pool, nil
}
