package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

// LogConfig says what is logged and how. The zero value logs info and above
// as text.
type LogConfig struct {
	Level  string // debug, info, warn or error; empty is info.
	Format string // text or json; empty is text.
}

// AddFlags registers --log-level and --log-format on a flag set of package
// flag or of pflag.
func (c *LogConfig) AddFlags(fs interface {
	StringVar(p *string, name, value, usage string)
},
) {
	fs.StringVar(&c.Level, "log-level", "info", "least level to log: debug, info, warn or error")
	fs.StringVar(&c.Format, "log-format", "text", "form of log lines: text or json")
}

// NewLogger returns a logger that writes to w as c says.
func NewLogger(w io.Writer, c LogConfig) (*slog.Logger, error) {
	opts := &slog.HandlerOptions{}
	if c.Level != "" {
		var level slog.Level
		if err := level.UnmarshalText([]byte(c.Level)); err != nil {
			return nil, fmt.Errorf("parse log level %q: want debug, info, warn or error", c.Level)
		}
		opts.Level = level
	}
	switch c.Format {
	case "", "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	}
	return nil, fmt.Errorf("parse log format %q: want text or json", c.Format)
}

// SetDefaultLogger makes log the process's logger: of package slog, of the
// standard log package and of klog, through which client-go writes. Call it
// once, before anything logs: klog's setter is not safe for concurrent use.
//
// klog's own verbosity stays 0 unless log takes debug lines; then it is 4,
// which is where client-go tells of its watches and retries.
func SetDefaultLogger(ctx context.Context, log *slog.Logger) error {
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
	verbosity := "0"
	if log.Enabled(ctx, slog.LevelDebug) {
		verbosity = "4"
	}
	var level klog.Level
	if err := level.Set(verbosity); err != nil {
		return fmt.Errorf("set verbosity of klog: %w", err)
	}
	return nil
}

// Logr returns log for libraries that speak logr, such as controller-runtime.
// logr's V(4) and above are debug lines.
func Logr(log *slog.Logger) logr.Logger {
	return logr.FromSlogHandler(log.Handler())
}
