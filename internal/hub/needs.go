package hub

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/yurt-edge/yurt/internal/hub/replica"
	"github.com/yurt-edge/yurt/internal/hub/request"
	"github.com/yurt-edge/yurt/internal/hub/wire"
)

const (
	// maxNeeds bounds the ConfigMaps and Secrets that are held for the node's
	// pods. The kubelet's own limit of pods is 110.
	maxNeeds = 512
	// needsEvery is how often it is looked whether the pods are known yet,
	// and how long changes of them are gathered.
	needsEvery = time.Second
)

// keepNeeds holds what the node's pods mount and read, whether the kubelet
// asks for it or not: a hub that has lost its store is ready for the next
// outage as soon as it has fetched that, and not only when the kubelet comes
// back to its watches. These are the kubelet's own scopes, so that nothing is
// fetched twice; what no pod needs any more is let go as everything else that
// nobody uses.
func (h *Hub) keepNeeds(ctx context.Context) error {
	pods := h.ownPods()
	held := map[replica.Scope]bool{}
	for {
		var changed <-chan struct{}
		again := time.After(needsEvery)
		if slice, ok := h.replica.Held(pods); ok {
			changed = slice.Changed()
			if err := h.hold(held); err != nil { //nolint:contextcheck // a scope outlives whoever asked for it
				h.log.Warn("what pods need is not all held", "err", err)
			} else {
				again = nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-again:
			continue
		case <-changed:
		}
		select { // a pod's status changes often, what it needs never does
		case <-ctx.Done():
			return nil
		case <-time.After(needsEvery):
		}
	}
}

// hold makes held what the pods need now.
func (h *Hub) hold(held map[replica.Scope]bool) error {
	wanted := map[replica.Scope]bool{}
	err := h.replica.Each(podsResource, "", func(_ string, k replica.Kind, data []byte) error {
		meta, err := wire.ReadMeta(k.Encoding, data, true)
		if err != nil || meta.NodeName != h.cfg.NodeName || k.Encoding != wire.Protobuf {
			return err
		}
		pod := &corev1.Pod{}
		if err := pod.Unmarshal(data); err != nil {
			return fmt.Errorf("read pod: %w", err)
		}
		for _, scope := range needsOf(pod) {
			wanted[scope] = true
		}
		return nil
	})
	if err != nil {
		return err // nothing is let go for a pod that could not be read
	}
	for scope := range held {
		if !wanted[scope] {
			h.replica.Unpin(scope)
			delete(held, scope)
		}
	}
	for _, scope := range slices.SortedFunc(maps.Keys(wanted), func(a, b replica.Scope) int { return strings.Compare(a.ID(), b.ID()) }) {
		if held[scope] {
			continue
		}
		if len(held) >= maxNeeds {
			h.log.Warn("pods need more than is held for them", "limit", maxNeeds, "needed", len(wanted))
			return nil
		}
		if err := h.replica.Pin(scope); err != nil {
			return err
		}
		held[scope] = true
	}
	return nil
}

// needsOf are the scopes of the ConfigMaps and Secrets without which the
// kubelet cannot start the pod.
func needsOf(pod *corev1.Pod) []replica.Scope {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil
	}
	var out []replica.Scope
	need := func(resource, name string) {
		if name == "" {
			return
		}
		out = append(out, replica.Scope{
			Resource:  schema.GroupVersionResource{Version: "v1", Resource: resource},
			Namespace: pod.Namespace, Fields: "metadata.name=" + name,
		})
	}
	secret := func(ref *corev1.LocalObjectReference) {
		if ref != nil {
			need("secrets", ref.Name)
		}
	}
	for i := range pod.Spec.ImagePullSecrets {
		secret(&pod.Spec.ImagePullSecrets[i])
	}
	for i := range pod.Spec.Volumes {
		volumeNeeds(&pod.Spec.Volumes[i].VolumeSource, need, secret)
	}
	env := func(from []corev1.EnvFromSource, vars []corev1.EnvVar) {
		for _, f := range from {
			if f.ConfigMapRef != nil {
				need("configmaps", f.ConfigMapRef.Name)
			}
			if f.SecretRef != nil {
				need("secrets", f.SecretRef.Name)
			}
		}
		for _, v := range vars {
			if v.ValueFrom == nil {
				continue
			}
			if ref := v.ValueFrom.ConfigMapKeyRef; ref != nil {
				need("configmaps", ref.Name)
			}
			if ref := v.ValueFrom.SecretKeyRef; ref != nil {
				need("secrets", ref.Name)
			}
		}
	}
	for _, c := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
		env(c.EnvFrom, c.Env)
	}
	for _, c := range pod.Spec.EphemeralContainers {
		env(c.EnvFrom, c.Env)
	}
	return out
}

func volumeNeeds(v *corev1.VolumeSource, need func(resource, name string), secret func(*corev1.LocalObjectReference)) {
	switch {
	case v.ConfigMap != nil:
		need("configmaps", v.ConfigMap.Name)
	case v.Secret != nil:
		need("secrets", v.Secret.SecretName)
	case v.Projected != nil:
		for _, source := range v.Projected.Sources {
			if source.ConfigMap != nil {
				need("configmaps", source.ConfigMap.Name)
			}
			if source.Secret != nil {
				need("secrets", source.Secret.Name)
			}
		}
	case v.CSI != nil:
		secret(v.CSI.NodePublishSecretRef)
	case v.FlexVolume != nil:
		secret(v.FlexVolume.SecretRef)
	case v.ISCSI != nil:
		secret(v.ISCSI.SecretRef)
	case v.CephFS != nil:
		secret(v.CephFS.SecretRef)
	case v.RBD != nil:
		secret(v.RBD.SecretRef)
	case v.ScaleIO != nil:
		secret(v.ScaleIO.SecretRef)
	case v.AzureFile != nil:
		need("secrets", v.AzureFile.SecretName)
	}
}

// prefetchCSINode fetches what csiNode keeps, unless it is kept already. The
// kubelet asks for it only when it starts.
func (h *Hub) prefetchCSINode(ctx context.Context) error {
	info := request.Info{Path: "/apis/storage.k8s.io/v1/csinodes/" + h.cfg.NodeName}
	if _, err := h.answers.object(h.self, info); err == nil {
		return nil
	}
	target := url.URL{Scheme: "https", Host: "upstream", Path: info.Path}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return fmt.Errorf("prefetch the node's storage drivers: %w", err)
	}
	req.Header = http.Header{"Accept": {"application/json"}, "User-Agent": {"yurthub"}}
	resp, err := h.link.Questions().RoundTrip(req)
	if err != nil {
		return fmt.Errorf("prefetch the node's storage drivers: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(body) > maxAnswer {
		err = errors.New("the answer is too large")
	}
	if err != nil {
		return fmt.Errorf("prefetch the node's storage drivers: %w", err)
	}
	if done := h.answers.keep(objectBucket, objectKey(h.self, info))(resp); done != nil {
		done(body)
	}
	return nil
}
