package httpx

import (
	"encoding/json"
	"errors"
	"mime"
	"net/http"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	mediaJSON     = "application/json"
	mediaProtobuf = "application/vnd.kubernetes.protobuf"
)

// WriteStatus replies with err as a metav1.Status in the encoding that the
// caller's Accept header prefers, as the API server would. An error that is
// not an API status becomes a 500 with its text. A RetryAfterSeconds in the
// status is also sent as the Retry-After header.
//
// Nothing may have been written to w before.
func WriteStatus(w http.ResponseWriter, r *http.Request, err error) {
	status := statusOf(err)
	body, media, encodeErr := encodeStatus(&status, acceptsProtobuf(r.Header))
	if encodeErr != nil {
		http.Error(w, encodeErr.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", media)
	h.Set("Cache-Control", "no-cache, private")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if d := status.Details; d != nil && d.RetryAfterSeconds > 0 {
		h.Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
	}
	w.WriteHeader(int(status.Code))
	// The client is gone on an error; there is nobody to tell.
	_, _ = w.Write(body)
}

func statusOf(err error) metav1.Status {
	var api apierrors.APIStatus
	if !errors.As(err, &api) {
		api = apierrors.NewInternalError(err)
	}
	status := api.Status()
	status.TypeMeta = metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}
	if status.Status == "" {
		status.Status = metav1.StatusFailure
	}
	if status.Code < 100 || status.Code > 999 {
		status.Code = http.StatusInternalServerError
	}
	return status
}

func encodeStatus(status *metav1.Status, protobuf bool) (body []byte, media string, err error) {
	if !protobuf {
		body, err = json.Marshal(status)
		return append(body, '\n'), mediaJSON, err
	}
	raw, err := status.Marshal()
	if err != nil {
		return nil, "", err
	}
	envelope, err := (&runtime.Unknown{
		TypeMeta: runtime.TypeMeta{APIVersion: "v1", Kind: "Status"},
		Raw:      raw,
	}).Marshal()
	if err != nil {
		return nil, "", err
	}
	return append([]byte("k8s\x00"), envelope...), mediaProtobuf, nil
}

// acceptsProtobuf tells whether the most wanted media type that we can
// write is protobuf. Of equal weights the first named wins.
func acceptsProtobuf(h http.Header) bool {
	protobuf, best := false, 0.0
	for _, line := range h.Values("Accept") {
		for clause := range strings.SplitSeq(line, ",") {
			media, params, err := mime.ParseMediaType(clause)
			if err != nil {
				continue
			}
			if _, as := params["as"]; as {
				continue // another view of an object: errors have none
			}
			q := 1.0
			if s, ok := params["q"]; ok {
				if q, err = strconv.ParseFloat(s, 64); err != nil {
					continue
				}
			}
			switch media {
			case mediaProtobuf, mediaJSON, "application/*", "*/*":
				if q > best {
					protobuf, best = media == mediaProtobuf, q
				}
			}
		}
	}
	return protobuf
}
