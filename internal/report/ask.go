package report

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"time"
)

const askBudget = 10 * time.Second

// Ask reads the report of the hub whose run directory that is. The hub answers
// root alone.
func Ask(ctx context.Context, runDir string) (*Report, error) {
	client := &http.Client{Timeout: askBudget, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", filepath.Join(runDir, SocketName))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://hub"+StatusPath, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if wrapped, is := errors.AsType[*url.Error](err); is {
		err = wrapped.Err // its URL is no address
	}
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it answered %s", resp.Status)
	}
	out := &Report{}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return nil, fmt.Errorf("read its answer: %w", err)
	}
	return out, nil
}
