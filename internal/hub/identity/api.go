package identity

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// API is what the package asks of the cloud, with the hub's own credential.
// Every method honours the deadline of its context. An error means that the
// question was not answered, never that the answer was no.
type API interface {
	// TokenReview asks whose token this is. No audiences means the API
	// server's own.
	TokenReview(ctx context.Context, token string, audiences []string) (*authenticationv1.TokenReview, error)
	// SubjectAccessReview asks whether the subject may do what the spec says.
	SubjectAccessReview(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error)
	// Keys returns the cluster's ServiceAccount signing keys as a JSON Web Key
	// Set, and the issuer of the tokens that they sign.
	Keys(ctx context.Context) (jwks []byte, issuer string, err error)
}

// maxAnswer bounds what is read of one answer.
const maxAnswer = 1 << 20

type httpAPI struct {
	client *http.Client
	server string
}

// NewAPI returns the API of the given server, such as "https://10.0.0.1:6443".
// The client carries the hub's credential and the trust in the server; it may
// also choose among several servers.
func NewAPI(client *http.Client, server string) API {
	return &httpAPI{client: client, server: strings.TrimSuffix(server, "/")}
}

func (a *httpAPI) TokenReview(ctx context.Context, token string, audiences []string) (*authenticationv1.TokenReview, error) {
	in := &authenticationv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"},
		Spec:     authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences},
	}
	out := &authenticationv1.TokenReview{}
	if err := a.do(ctx, http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", in, out); err != nil {
		return nil, fmt.Errorf("review token: %w", err)
	}
	return out, nil
}

func (a *httpAPI) SubjectAccessReview(ctx context.Context, review *authorizationv1.SubjectAccessReview) (*authorizationv1.SubjectAccessReview, error) {
	in := *review
	in.TypeMeta = metav1.TypeMeta{APIVersion: "authorization.k8s.io/v1", Kind: "SubjectAccessReview"}
	out := &authorizationv1.SubjectAccessReview{}
	if err := a.do(ctx, http.MethodPost, "/apis/authorization.k8s.io/v1/subjectaccessreviews", &in, out); err != nil {
		return nil, fmt.Errorf("review access: %w", err)
	}
	return out, nil
}

func (a *httpAPI) Keys(ctx context.Context) ([]byte, string, error) {
	var discovery struct {
		Issuer string `json:"issuer"`
	}
	if err := a.do(ctx, http.MethodGet, "/.well-known/openid-configuration", nil, &discovery); err != nil {
		return nil, "", fmt.Errorf("get issuer: %w", err)
	}
	var keys json.RawMessage
	// The document's own jwks_uri may name an address that only the cloud can
	// reach; the API server serves the keys here too.
	if err := a.do(ctx, http.MethodGet, "/openid/v1/jwks", nil, &keys); err != nil {
		return nil, "", fmt.Errorf("get signing keys: %w", err)
	}
	return keys, discovery.Issuer, nil
}

func (a *httpAPI) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, a.server+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json, application/jwk-set+json")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		var status metav1.Status
		if json.Unmarshal(data, &status) == nil && status.Message != "" {
			return fmt.Errorf("%s: %s", resp.Status, status.Message)
		}
		return fmt.Errorf("%s from %s", resp.Status, path)
	}
	return json.Unmarshal(data, out)
}
