package wire

import (
	"encoding/json"
	"sync"

	appsv1 "k8s.io/api/apps/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metav1beta1 "k8s.io/apimachinery/pkg/apis/meta/v1beta1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
)

// kinds is the scheme of every kind whose Go type is linked in.
var kinds = sync.OnceValue(func() *runtime.Scheme {
	s := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		clientscheme.AddToScheme,
		apiextensionsv1.AddToScheme,
		metav1.AddMetaToScheme,
		metav1beta1.AddMetaToScheme,
	} {
		if err := add(s); err != nil {
			panic("wire: register API types: " + err.Error())
		}
	}
	return s
})

func gvkOf(apiVersion, kind string) schema.GroupVersionKind {
	return schema.FromAPIVersionAndKind(apiVersion, kind)
}

// Known says whether a kind has a Go type in this build. Others are custom
// resources or newer than this build.
func Known(apiVersion, kind string) bool { return kinds().Recognizes(gvkOf(apiVersion, kind)) }

// protoMessage is what every generated API type offers.
type protoMessage interface {
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

// Bookmark returns the object data of a bookmark: the empty object of its kind
// with a version. initialEventsEnd marks the end of the initial events of a
// WatchList.
func Bookmark(enc Encoding, apiVersion, kind string, version uint64, initialEventsEnd bool) []byte {
	obj, err := kinds().New(gvkOf(apiVersion, kind))
	meta, ok := obj.(metav1.Object)
	if err != nil || !ok {
		return customBookmark(apiVersion, kind, version, initialEventsEnd)
	}
	meta.SetResourceVersion(formatVersion(version))
	annotations := make(map[string]string)
	if initialEventsEnd {
		annotations[metav1.InitialEventsAnnotationKey] = "true"
	}
	asConverted(obj, annotations)
	if len(annotations) > 0 {
		meta.SetAnnotations(annotations)
	}
	var data []byte
	if m, ok := obj.(protoMessage); ok && enc == Protobuf {
		data, err = m.Marshal()
	} else {
		obj.GetObjectKind().SetGroupVersionKind(gvkOf(apiVersion, kind))
		data, err = json.Marshal(obj)
	}
	if err != nil {
		// An empty object of a linked type always marshals.
		panic("wire: marshal bookmark: " + err.Error())
	}
	return data
}

// asConverted sets what the API server's conversion from its internal version
// gives to an empty object.
func asConverted(obj runtime.Object, annotations map[string]string) {
	switch o := obj.(type) {
	case *appsv1.Deployment:
		o.Spec.Replicas = new(int32)
	case *appsv1.ReplicaSet:
		o.Spec.Replicas = new(int32)
	case *appsv1.StatefulSet:
		o.Spec.Replicas = new(int32)
	case *appsv1.DaemonSet:
		annotations[appsv1.DeprecatedTemplateGeneration] = "0"
	}
}

func customBookmark(apiVersion, kind string, version uint64, initialEventsEnd bool) []byte {
	dst := append([]byte(nil), `{"apiVersion":`...)
	dst = appendJSONString(dst, apiVersion)
	dst = append(dst, `,"kind":`...)
	dst = appendJSONString(dst, kind)
	dst = append(dst, `,"metadata":{`...)
	if initialEventsEnd {
		dst = append(dst, `"annotations":{"`+metav1.InitialEventsAnnotationKey+`":"true"},`...)
	}
	dst = append(dst, `"resourceVersion":"`...)
	dst = append(dst, formatVersion(version)...)
	return append(dst, `"}}`...)
}
