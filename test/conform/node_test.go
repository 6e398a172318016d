package conform

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/yurt-edge/yurt/test/bed"
)

// TestNodeWrites does what a kubelet does while the cloud is away, and looks
// at what the node sees at once and the cloud in the end.
func TestNodeWrites(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg, err := busy.Hub.KubeletConfig()
	must(err)
	kubelet, err := kubernetes.NewForConfig(cfg)
	must(err)
	_, edge := busy.sides(t, busy.Hub, "reader")
	inCloud := busy.admin.CoreV1().Pods("conform-b")
	made := map[string]*corev1.Pod{}
	for _, name := range []string{"kept", "replaced", "deleted"} {
		made[name], err = inCloud.Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PodSpec{
				NodeName: "edge-1", ServiceAccountName: "reader", Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers: []corev1.Container{{Name: "main", Image: "example.invalid/x:1"}},
			},
		}, metav1.CreateOptions{})
		must(err)
	}
	// What a kubelet is informed of.
	node := metav1.ListOptions{ResourceVersion: "0", FieldSelector: "metadata.name=edge-1"}
	_, err = kubelet.CoreV1().Nodes().List(ctx, node)
	must(err)
	mustAwait(t, func(ctx context.Context) error {
		mine, err := kubelet.CoreV1().Pods("").List(ctx, metav1.ListOptions{ResourceVersion: "0", FieldSelector: "spec.nodeName=edge-1"})
		if err == nil && len(mine.Items) < 6 {
			err = fmt.Errorf("the kubelet sees %d pods", len(mine.Items))
		}
		return err
	})
	leases := kubelet.CoordinationV1().Leases("kube-node-lease")
	mustAwait(t, func(ctx context.Context) error {
		_, err := leases.Get(ctx, "edge-1", metav1.GetOptions{})
		return err
	})
	event, err := kubelet.CoreV1().Events("conform-b").Create(ctx, podEvent(made["kept"], "known"), metav1.CreateOptions{})
	must(err)
	warm(t, edge, "/api/v1/pods")
	stream, err := edge.open(ctx, question{"/api/v1/namespaces/conform-b/pods", "watch=true&fieldSelector=metadata.name%3Dkept", inJSON})
	must(err)
	defer stream.Body.Close()
	lines := bufio.NewReader(stream.Body)
	if first, err := lines.ReadBytes('\n'); err != nil || !bytes.Contains(first, []byte(`"ADDED"`)) {
		t.Fatalf("first event: %s, %v", first, err)
	}

	cut(t, busy.Link, edge, bed.Down)
	// The heartbeat is answered with itself.
	lease, err := leases.Get(ctx, "edge-1", metav1.GetOptions{})
	must(err)
	now := metav1.NowMicro()
	lease.Spec.RenewTime = &now
	renewed, err := leases.Update(ctx, lease, metav1.UpdateOptions{})
	must(err)
	if !renewed.Spec.RenewTime.Time.Equal(now.Truncate(1000)) && !renewed.Spec.RenewTime.Equal(&now) {
		t.Errorf("lease renewed at %s, answered %s", now, renewed.Spec.RenewTime)
	}
	if _, err = leases.Create(ctx, &coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Name: "edge-1"}}, metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("create a lease that is there: %v", err)
	}

	// Statuses are seen on the node at once.
	ip := func(name, ip string) {
		t.Helper()
		patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"phase":"Running","podIP":%q,"podIPs":[{"ip":%q},{"$patch":"replace"}],"conditions":[{"type":"Ready","status":"True"}]}}`, made[name].UID, ip, ip)
		p, err := kubelet.CoreV1().Pods("conform-b").Patch(ctx, name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
		must(err)
		if p.Status.PodIP != ip || p.Status.Phase != corev1.PodRunning {
			t.Errorf("%s: answered %+v", name, p.Status)
		}
	}
	ip("kept", "10.1.0.1")
	ip("replaced", "10.1.0.2")
	ip("deleted", "10.1.0.3")
	ip("kept", "10.1.0.4")
	for range 2 {
		line, err := lines.ReadBytes('\n')
		if err != nil || !bytes.Contains(line, []byte(`"MODIFIED"`)) || !bytes.Contains(line, []byte(`"podIP":"10.1.0.`)) {
			t.Errorf("watcher on the node: %v %.400s", err, line)
		}
	}
	a := edge.mustAsk(t, question{"/api/v1/namespaces/conform-b/pods/kept", "resourceVersion=0", inJSON})
	if !bytes.Contains(a.body, []byte(`"podIP":"10.1.0.4"`)) || !bytes.Contains(a.body, []byte(`"phase":"Running"`)) {
		t.Errorf("reader on the node: %s", a.body)
	}
	patch := []byte(`{"status":{"conditions":[{"type":"Ready","status":"True","reason":"FromTheEdge"}]}}`)
	n, err := kubelet.CoreV1().Nodes().Patch(ctx, "edge-1", types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	must(err)
	if n.Status.Conditions[0].Reason != "FromTheEdge" {
		t.Errorf("node status answered: %+v", n.Status.Conditions)
	}

	// Events are taken.
	_, err = kubelet.CoreV1().Events("conform-b").Create(ctx, podEvent(made["kept"], "offline"), metav1.CreateOptions{})
	must(err)
	patched, err := kubelet.CoreV1().Events("conform-b").Patch(ctx, "offline", types.StrategicMergePatchType, []byte(`{"count":2}`), metav1.PatchOptions{})
	if err != nil || patched.Name != "offline" || patched.Count != 2 {
		t.Errorf("patch an event that the hub has: %+v, %v", patched, err)
	}
	// Of one that only the cloud has a recorder makes a new one when told
	// that it is not there.
	_, err = kubelet.CoreV1().Events("conform-b").Patch(ctx, event.Name, types.StrategicMergePatchType, []byte(`{"count":7}`), metav1.PatchOptions{})
	if !apierrors.IsNotFound(err) {
		t.Errorf("patch an event that the cloud has: %v", err)
	}
	more := podEvent(made["kept"], event.Name)
	more.Count = 7
	must(second(kubelet.CoreV1().Events("conform-b").Create(ctx, more, metav1.CreateOptions{})))

	token := offlineToken(t, kubelet, made["kept"])
	unkept(t, kubelet, made["kept"])
	api, pods := kubelet.CoreV1().RESTClient(), "/api/v1/namespaces/conform-b/pods"
	for what, request := range map[string]*rest.Request{
		"create a pod": api.Post().AbsPath(pods).Body(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}}),
		"delete a pod": api.Delete().AbsPath(pods + "/kept"),
		"patch a pod":  api.Patch(types.MergePatchType).AbsPath(pods + "/kept").Body([]byte(`{}`)),
		"patch a node": api.Patch(types.MergePatchType).AbsPath("/api/v1/nodes/edge-1").Body([]byte(`{}`)),
	} {
		// Else client-go would do as Retry-After says, ten times.
		err := request.MaxRetries(0).Do(ctx).Error()
		if !apierrors.IsServiceUnavailable(err) {
			t.Errorf("%s while the cloud is away: %v", what, err)
		}
	}

	// Meanwhile the cloud lets one pod go and puts another in its place.
	grace := int64(0)
	for _, name := range []string{"replaced", "deleted"} {
		must(inCloud.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}))
	}
	again := made["replaced"].DeepCopy()
	again.ObjectMeta = metav1.ObjectMeta{Name: "replaced"}
	again.Status = corev1.PodStatus{}
	again, err = inCloud.Create(ctx, again, metav1.CreateOptions{})
	must(err)
	heal(t, busy.Link, edge)
	mustAwait(t, func(ctx context.Context) error {
		p, err := inCloud.Get(ctx, "kept", metav1.GetOptions{})
		if err == nil && (p.Status.PodIP != "10.1.0.4" || p.Status.Phase != corev1.PodRunning) {
			err = fmt.Errorf("the cloud has %+v", p.Status)
		}
		return err
	})
	mustAwait(t, func(ctx context.Context) error {
		n, err := busy.admin.CoreV1().Nodes().Get(ctx, "edge-1", metav1.GetOptions{})
		if err == nil && n.Status.Conditions[0].Reason != "FromTheEdge" {
			err = fmt.Errorf("the cloud has %+v", n.Status.Conditions)
		}
		return err
	})
	mustAwait(t, func(ctx context.Context) error {
		made, err := busy.admin.CoreV1().Events("conform-b").Get(ctx, "offline", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if made.Count != 2 {
			return fmt.Errorf("count is %d", made.Count)
		}
		e, err := busy.admin.CoreV1().Events("conform-b").Get(ctx, event.Name, metav1.GetOptions{})
		if err == nil && e.Count != 7 {
			err = fmt.Errorf("count is %d", e.Count)
		}
		return err
	})
	p, err := inCloud.Get(ctx, "replaced", metav1.GetOptions{})
	must(err)
	if p.UID != again.UID || p.Status.PodIP != "" {
		t.Errorf("the new pod got the status of the old one: %+v", p.Status)
	}
	// And the node sees what the cloud has, without what was overlaid.
	server, _ := busy.sides(t, busy.Hub, "reader")
	mustAwait(t, func(ctx context.Context) error {
		return same(ctx, server, edge, question{"/api/v1/namespaces/conform-b/pods", "resourceVersion=0", inJSON})
	})
	// A token made on the node lives as long as its pod.
	ofPod := newSide(t, "hub", busy.through(t, busy.Hub, token))
	tokenIs := func(ctx context.Context, want int) error {
		a, err := ofPod.ask(ctx, question{"/version", "", inJSON})
		if err == nil && a.code != want {
			err = fmt.Errorf("with a token made on the node: %d %s", a.code, a.body)
		}
		return err
	}
	must(tokenIs(ctx, http.StatusOK))
	for _, name := range []string{"kept", "replaced"} {
		must(inCloud.Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &grace}))
	}
	mustAwait(t, func(ctx context.Context) error { return tokenIs(ctx, http.StatusUnauthorized) })
}

func second[T any](_ T, err error) error { return err }

func podEvent(pod *corev1.Pod, name string) *corev1.Event {
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: name, Namespace: pod.Namespace},
		InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Reason:         "Started", Message: "a container was started", Type: corev1.EventTypeNormal, Count: 1,
		Source: corev1.EventSource{Component: "kubelet", Host: "edge-1"},
	}
}

// offlineToken asks for the token of a pod, as a kubelet does to start it, and
// reads with it what the pod's account may read.
func offlineToken(t *testing.T, kubelet *kubernetes.Clientset, pod *corev1.Pod) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	accounts := kubelet.CoreV1().ServiceAccounts(pod.Namespace)
	made, err := accounts.CreateToken(t.Context(), "reader", request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Of this account nobody asked the cloud anything, so it may nothing; but
	// the hub knows who it is.
	edge := newSide(t, "hub", busy.through(t, busy.Hub, made.Status.Token))
	if a := edge.mustAsk(t, question{"/api/v1/namespaces/conform-b/pods", "resourceVersion=0", inJSON}); a.code != http.StatusForbidden {
		t.Errorf("with a token made on the node: %d %s", a.code, a.body)
	}
	if a := edge.mustAsk(t, question{"/version", "", inJSON}); a.code != http.StatusOK {
		t.Errorf("version with a token made on the node: %d %s", a.code, a.body)
	}
	for account, change := range map[string]func(*authenticationv1.TokenRequest){
		"default": func(*authenticationv1.TokenRequest) {},
		"reader":  func(r *authenticationv1.TokenRequest) { r.Spec.BoundObjectRef.UID = "another" },
	} {
		other := request.DeepCopy()
		change(other)
		if _, err := accounts.CreateToken(t.Context(), account, other, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
			t.Errorf("token of %s: %v", account, err)
		}
	}
	first := made.Status.Token
	// The reader of the other namespace may read, and still may with a token
	// that the hub makes.
	mine, err := busy.admin.CoreV1().Pods("conform-a").Get(t.Context(), "web-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	request.Spec.BoundObjectRef.Name, request.Spec.BoundObjectRef.UID = mine.Name, mine.UID
	made, err = kubelet.CoreV1().ServiceAccounts("conform-a").CreateToken(t.Context(), "reader", request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	edge = newSide(t, "hub", busy.through(t, busy.Hub, made.Status.Token))
	if a := edge.mustAsk(t, question{"/api/v1/pods", "resourceVersion=0", inJSON}); a.code != http.StatusOK {
		t.Errorf("with a token made on the node: %d %s", a.code, a.body)
	}
	// It is worth nothing anywhere else, one for somebody else nothing here,
	// and the kubelet is told to come back soon.
	direct := newSide(t, "API server", busy.config(made.Status.Token))
	if a := direct.mustAsk(t, question{"/version", "", inJSON}); a.code != http.StatusUnauthorized {
		t.Errorf("the API server takes a token made on the node: %d %s", a.code, a.body)
	}
	if left := time.Until(made.Status.ExpirationTimestamp.Time); left > 12*time.Minute || left < time.Minute {
		t.Errorf("the kubelet is told that the token expires in %s", left)
	}
	request.Spec.Audiences = []string{"vault"}
	foreign, err := kubelet.CoreV1().ServiceAccounts("conform-a").CreateToken(t.Context(), "reader", request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	edge = newSide(t, "hub", busy.through(t, busy.Hub, foreign.Status.Token))
	if a := edge.mustAsk(t, question{"/version", "", inJSON}); a.code != http.StatusUnauthorized {
		t.Errorf("a token for another audience: %d %s", a.code, a.body)
	}
	return first
}

// unkept asks for what must not be kept: it gets an error that says so.
func unkept(t *testing.T, kubelet *kubernetes.Clientset, pod *corev1.Pod) {
	t.Helper()
	mine, err := kubernetes.NewForConfig(busy.through(t, busy.Hub, busy.tokens["reader"]))
	if err != nil {
		t.Fatal(err)
	}
	base := "/api/v1/namespaces/" + pod.Namespace
	status := []byte(`{"status":{"phase":"Failed"}}`)
	own, other := mine.CoreV1().RESTClient(), kubelet.CoreV1().RESTClient()
	review := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
		User: "never-asked", ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: "get", Resource: "nodes"},
	}}
	for what, request := range map[string]*rest.Request{
		"a pod's event":               own.Post().AbsPath(base + "/events").Body(podEvent(pod, "of-a-pod")),
		"a status by a pod":           own.Patch(types.StrategicMergePatchType).AbsPath(base + "/pods/" + pod.Name + "/status").Body(status),
		"a whole status":              other.Put().AbsPath(base + "/pods/" + pod.Name + "/status").Body(pod),
		"a node's whole status":       other.Put().AbsPath("/api/v1/nodes/edge-1/status").Body(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "edge-1"}}),
		"a review never asked before": kubelet.AuthorizationV1().RESTClient().Post().Resource("subjectaccessreviews").Body(review),
	} {
		if err := request.MaxRetries(0).Do(t.Context()).Error(); !apierrors.IsServiceUnavailable(err) {
			t.Errorf("%s while the cloud is away: %v", what, err)
		}
	}
}
