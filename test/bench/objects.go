package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	authnv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	protobufcodec "k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	slicePath = "/apis/discovery.k8s.io/v1/namespaces/%s/endpointslices"
	mapPath   = "/api/v1/namespaces/%s/configmaps"
	podPath   = "/api/v1/namespaces/%s/pods"

	endpoints = 50 // of a full slice, which makes it about 12 KB

	// mark precedes the number of an update, which has always marked digits.
	mark   = "update-"
	marked = 10
)

// prepare makes the bench's user, and lets nodes replicate ConfigMaps so that
// hubs do it by their own right.
func (b *bench) prepare(ctx context.Context) error {
	var err error
	if b.admin, err = kubernetes.NewForConfig(b.cloud.RESTConfig()); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	err = b.cloud.Apply(ctx, `
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: bench}
rules:
- {apiGroups: [""], resources: [configmaps], verbs: [get, list, watch]}
- {apiGroups: [apps.openyurt.io], resources: [nodepools], verbs: [get, list, watch]}
- {apiGroups: [network.openyurt.io], resources: [accessfilters], verbs: [get, list, watch]}
`)
	if err != nil {
		return err
	}
	for role, subject := range map[string]rbacv1.Subject{
		"bench":         {Kind: "Group", APIGroup: rbacv1.GroupName, Name: "system:nodes"},
		"cluster-admin": {Kind: "ServiceAccount", Namespace: "default", Name: "bench"},
	} {
		_, err := b.admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{
			ObjectMeta: metav1.ObjectMeta{Name: "bench-" + role},
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			Subjects:   []rbacv1.Subject{subject},
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
	}
	accounts := b.admin.CoreV1().ServiceAccounts("default")
	if _, err = accounts.Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bench"}}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	day := int64(24 * 3600)
	review, err := accounts.CreateToken(ctx, "bench", &authnv1.TokenRequest{
		Spec: authnv1.TokenRequestSpec{ExpirationSeconds: &day},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	b.token = review.Status.Token
	return nil
}

// direct is the bench's user at the API server itself.
func (b *bench) direct() target {
	cfg := b.cloud.RESTConfig()
	cfg.CertFile, cfg.CertData, cfg.BearerToken = "", nil, b.token
	t, err := newTarget(cfg, b.http1)
	if err != nil {
		panic(err) // the control plane made the configuration
	}
	return t
}

func (b *bench) namespace(ctx context.Context, name string) error {
	_, err := b.admin.CoreV1().Namespaces().Create(ctx,
		&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make namespace: %w", err)
	}
	return nil
}

// encode returns an object as protobuf, as the API's clients send it.
func encode(obj runtime.Object) ([]byte, error) {
	var buf bytes.Buffer
	s := protobufcodec.NewSerializer(scheme.Scheme, scheme.Scheme)
	if err := s.Encode(obj, &buf); err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return buf.Bytes(), nil
}

// newSlice is an EndpointSlice of n endpoints. Nothing but the bench touches
// it, since no service and no controller owns it.
func newSlice(namespace, name string, n int) *discoveryv1.EndpointSlice {
	port, portName, yes := int32(8080), "http", true
	s := &discoveryv1.EndpointSlice{
		TypeMeta: metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: name, Labels: map[string]string{"kubernetes.io/service-name": namespace},
			Annotations: map[string]string{"bench": update(0)},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &portName, Port: &port}},
	}
	for i := range n {
		host := fmt.Sprintf("order-service-backend-%05d", i)
		node, zone := fmt.Sprintf("edge-machine-%02d.factory-floor-2.hangzhou.example.org", i%20), "cn-hangzhou-b"
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses:  []string{fmt.Sprintf("10.244.%d.%d", i/200, i%200+1)},
			Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes},
			Hostname:   &host, NodeName: &node, Zone: &zone,
			TargetRef: &corev1.ObjectReference{
				Kind: "Pod", Namespace: namespace, Name: fmt.Sprintf("order-service-backend-%s-7d9c5b6f4d-%05d", name, i),
				UID: "6f0a2c34-9d0b-4c1d-8f39-0d6a3f4b5c6d",
			},
		})
	}
	return s
}

// variedSliceIn makes slices of which no two endpoints have the names and UIDs
// of their pods in common: they pack as those of a real cluster do.
func variedSliceIn(namespace string) func(string) runtime.Object {
	return func(name string) runtime.Object {
		s := newSlice(namespace, name, endpoints)
		for i := range s.Endpoints {
			sum := sha256.Sum256(fmt.Append(nil, name, i))
			pod := s.Endpoints[i].TargetRef
			pod.UID = types.UID(fmt.Sprintf("%x-%x-%x-%x-%x", sum[:4], sum[4:6], sum[6:8], sum[8:10], sum[10:16]))
			pod.Name = fmt.Sprintf("order-service-backend-%x-%x", sum[16:21], sum[21:24])
			host := pod.Name
			s.Endpoints[i].Hostname = &host
			s.Endpoints[i].Addresses = []string{fmt.Sprintf("10.%d.%d.%d", sum[24], sum[25], sum[26])}
		}
		return s
	}
}

func update(n int) string { return fmt.Sprintf("%s%0*d", mark, marked, n) }

// markIn returns where the number of an object's update stands, or -1.
func markIn(object []byte) int {
	at := bytes.Index(object, []byte(mark))
	if at < 0 {
		return -1
	}
	return at + len(mark)
}

// updateIn returns the number of the update that wrote an object.
func updateIn(object []byte) int {
	at := markIn(object)
	if at < 0 || len(object) < at+marked {
		return -1
	}
	n, err := strconv.Atoi(string(object[at : at+marked]))
	if err != nil {
		return -1
	}
	return n
}

// newMap is a ConfigMap of about size bytes.
func newMap(namespace, name string, size int) *corev1.ConfigMap {
	const rest = 200 // of metadata
	return &corev1.ConfigMap{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Data:       map[string]string{"settings": filler(size - rest)},
	}
}

// filler is text that compresses about as well as a configuration does.
func filler(size int) string {
	var text strings.Builder
	for i := uint32(1); text.Len() < size; i++ {
		fmt.Fprintf(&text, "option-%d = %08x\n", i, i*2654435761)
	}
	return text.String()[:size]
}

// create makes n objects in a namespace of their own, unless it was made.
func (b *bench) create(ctx context.Context, path, namespace string, n int, build func(name string) runtime.Object) error {
	c := b.direct().connect()
	defer c.close()
	if _, err := c.get(ctx, "/api/v1/namespaces/"+namespace, jsonType); err == nil {
		return nil
	}
	if err := b.namespace(ctx, namespace); err != nil {
		return err
	}
	path = fmt.Sprintf(path, namespace)
	const writers = 8
	g, ctx := errgroup.WithContext(ctx)
	for w := range writers {
		g.Go(func() error {
			c := b.direct().connect()
			defer c.close()
			for i := w; i < n; i += writers {
				body, err := encode(build(fmt.Sprintf("object-%05d", i)))
				if err != nil {
					return err
				}
				if _, err = c.send(ctx, http.MethodPost, path, protobuf, body, protobuf); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func sliceIn(namespace string) func(string) runtime.Object {
	return func(name string) runtime.Object { return newSlice(namespace, name, endpoints) }
}

func smallSliceIn(namespace string) func(string) runtime.Object {
	return func(name string) runtime.Object { return newSlice(namespace, name, 2) }
}

// slices makes n EndpointSlices of 50 endpoints.
func (b *bench) slices(ctx context.Context, namespace string, n int) error {
	return b.create(ctx, slicePath, namespace, n, sliceIn(namespace))
}

// maps makes n ConfigMaps.
func (b *bench) maps(ctx context.Context, namespace string, n, size int) error {
	return b.create(ctx, mapPath, namespace, n, func(name string) runtime.Object {
		return newMap(namespace, name, size)
	})
}

// pods makes a node and pods of about 2 KB on it.
func (b *bench) pods(ctx context.Context, namespace, node string, n int) error {
	_, err := b.admin.CoreV1().Nodes().Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: node},
	}, metav1.CreateOptions{})
	if err != nil {
		return fmt.Errorf("make node: %w", err)
	}
	return b.morePods(ctx, namespace, node, n)
}

// morePods makes n pods in a namespace of their own on a node that is there.
func (b *bench) morePods(ctx context.Context, namespace, node string, n int) error {
	no := false
	return b.create(ctx, podPath, namespace, n, func(name string) runtime.Object {
		return &corev1.Pod{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{
				Namespace: namespace, Name: name, Annotations: map[string]string{"bench": filler(1000)},
			},
			Spec: corev1.PodSpec{
				NodeName: node, AutomountServiceAccountToken: &no,
				Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers:  []corev1.Container{{Name: "web", Image: "example.org/web:1"}},
			},
		}
	})
}
