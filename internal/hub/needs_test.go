package hub

import (
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestNeedsOfAPod(t *testing.T) {
	secret := func(name string) *corev1.LocalObjectReference { return &corev1.LocalObjectReference{Name: name} }
	env := func(suffix string) corev1.Container {
		return corev1.Container{
			EnvFrom: []corev1.EnvFromSource{
				{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: *secret("c-from-" + suffix)}},
				{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: *secret("s-from-" + suffix)}},
			},
			Env: []corev1.EnvVar{
				{Name: "A", Value: "b"},
				{ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{}}},
				{ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: *secret("c-key-" + suffix)}}},
				{ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: *secret("s-key-" + suffix)}}},
			},
		}
	}
	volume := func(v corev1.VolumeSource) corev1.Volume { return corev1.Volume{VolumeSource: v} }
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop"}, Spec: corev1.PodSpec{
		ImagePullSecrets:    []corev1.LocalObjectReference{*secret("s-pull"), {}},
		InitContainers:      []corev1.Container{env("init")},
		Containers:          []corev1.Container{env("main")},
		EphemeralContainers: []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon(env("debug"))}},
		Volumes: []corev1.Volume{
			volume(corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}),
			volume(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: *secret("c-volume")}}),
			volume(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s-volume"}}),
			volume(corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
				{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}},
				{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: *secret("c-projected")}},
				{Secret: &corev1.SecretProjection{LocalObjectReference: *secret("s-projected")}},
			}}}),
			volume(corev1.VolumeSource{CSI: &corev1.CSIVolumeSource{NodePublishSecretRef: secret("s-csi")}}),
			volume(corev1.VolumeSource{ISCSI: &corev1.ISCSIVolumeSource{}}),
		},
	}}
	var got []string
	for _, scope := range needsOf(pod) {
		if scope.Namespace != "shop" || scope.Resource.Version != "v1" || scope.Resource.Group != "" || scope.Labels != "" {
			t.Errorf("scope %s", scope.ID())
		}
		got = append(got, scope.Resource.Resource+" "+scope.Fields)
	}
	slices.Sort(got)
	var want []string
	for _, name := range []string{"from-init", "from-main", "from-debug", "key-init", "key-main", "key-debug", "volume", "projected"} {
		want = append(want, "configmaps metadata.name=c-"+name, "secrets metadata.name=s-"+name)
	}
	want = append(want, "secrets metadata.name=s-pull", "secrets metadata.name=s-csi")
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q\nwant\n%q", got, want)
	}
	pod.Status.Phase = corev1.PodSucceeded
	if n := len(needsOf(pod)); n != 0 {
		t.Errorf("a pod that has ended needs %d", n)
	}
}

// TestTokenRenewal checks that a kubelet, which renews a token in the last
// fifth of the life that it asked for, renews at once what it got while the
// cloud was away, and does not take it for expired between two looks.
func TestTokenRenewal(t *testing.T) {
	for _, life := range []time.Duration{10 * time.Minute, 3607 * time.Second, 24 * time.Hour} {
		left := renewalOf(life)
		if left > life/5 {
			t.Errorf("asked for %s: said to expire in %s, renewed in %s", life, left, left-life/5)
		}
		if left < 100*time.Second {
			t.Errorf("asked for %s: expired after %s", life, left)
		}
	}
}
